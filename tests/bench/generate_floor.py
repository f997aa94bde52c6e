"""What no exact implementation goes below on one thread of this machine: prompts' arithmetic, reading while decoding.

Prompts: their multiply-adds at the speed of the fastest matrix product measured here, of the last layer for each token
but the last those of its keys and values only. A decoding step, of which there
are as many as the longest completion: the longer of its own multiply-adds at that speed and of reading all weights and
the factors of the adapters in use once from memory. Attention, norms, sampling and all overhead count as nothing, and
so does what a machine loses where one phase goes over into the other; a scheduler that decodes within prompts' steps
could go a little below.
Run: python -m tests.bench.generate_floor 1024:float32:16 …   (adds a line per variant to the settings' lines)
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.bench.generate_models import LAYERS, RANK, VOCABULARY, compositions, requests_of
from tests.bench.rounds import RESULTS

_PAIRS = ((2, 2), (2, 1), (2, 1), (2, 2))  # d_in, d_out of q, k, v, o in halves of the width


def shapes(hidden: int) -> list[tuple[int, int]]:
    """(d_in, d_out) of a layer's linear layers."""
    wide = hidden * 43 // 16
    attention = [(hidden * d_in // 2, hidden * d_out // 2) for d_in, d_out in _PAIRS]
    return [*attention, (hidden, wide), (hidden, wide), (wide, hidden)]


def _behind_keys(hidden: int) -> list[tuple[int, int]]:
    """Those of a layer that its keys and values do not need."""
    query, _key, _value, *others = shapes(hidden)
    return [query, *others]


def floor(hidden: int, itemsize: int, count: int, top_k: int, flops: float, bandwidth: float) -> dict[str, float]:
    """Seconds of prompts and of decoding. flops, bandwidth: of one thread, per second."""
    requests, mixes = requests_of(count), compositions(count, top_k)
    weights = LAYERS * sum(d_in * d_out for d_in, d_out in shapes(hidden))
    factors = LAYERS * RANK * sum(d_in + d_out for d_in, d_out in shapes(hidden))  # of one adapter
    head, of_token = VOCABULARY * hidden, 2 * (weights + top_k * factors)
    unread = 2 * sum(d_in * d_out + top_k * RANK * (d_in + d_out) for d_in, d_out in _behind_keys(hidden))
    tokens = sum(len(request.ids) for request in requests)
    prompts = tokens * of_token - (tokens - count) * unread + 2 * count * head
    decoding = 0.0
    for step in range(1, max(request.new_tokens for request in requests)):
        active = [i for i, request in enumerate(requests) if request.new_tokens > step]
        adapters = {slot for i in active for slot in mixes[i].slots}
        read = itemsize * (weights + head + len(adapters) * factors)
        decoding += max(read / bandwidth, len(active) * (of_token + 2 * head) / flops)
    return {"prompts_s": round(prompts / flops, 2), "decoding_s": round(decoding, 2)}


def peak_flops(dtype: torch.dtype) -> float:
    """The most that oneDNN reaches with weights laid out for it beforehand."""
    return max(_flops(512, d_in, d_out, dtype) for d_in, d_out in ((512, 512), (1024, 1024), (1024, 2752)))


def _flops(rows: int, d_in: int, d_out: int, dtype: torch.dtype) -> float:
    x, weight = torch.randn(rows, d_in).to(dtype), torch.randn(d_out, d_in).to(dtype)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    call = functools.partial(torch.ops.mkldnn._linear_pointwise, x, laid_out, None, "none", [], "")
    return 2 * rows * d_in * d_out / _least(call)


def peak_bandwidth() -> float:
    """Bytes per second that a sum over 256 MB reads."""
    numbers = torch.ones(64 << 20)
    return numbers.nbytes / _least(numbers.sum)


def _least(call: Callable[[], object]) -> float:
    times = []
    for _ in range(12):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times)


def added(lines: Sequence[dict[str, Any]], named: Sequence[str]) -> list[dict[str, Any]]:
    """The file's lines with floors for these settings, each behind its setting's other lines."""
    made = list(lines)
    for hidden, dtype, count in (one.split(":") for one in named):
        own = {"hidden": int(hidden), "dtype": dtype, "requests": int(count)}
        made = [line for line in made if not ("floor" in line and own.items() <= line.items())]
        last = max(i for i, line in enumerate(made) if own.items() <= line.items())
        peft = next(line for line in made if line.get("variant") == "e" and own.items() <= line.items())
        made[last + 1 : last + 1] = [own | _line(own, top_k, peft) for top_k in (1, 4)]
    return made


def _line(own: dict[str, Any], top_k: int, peft: dict[str, Any]) -> dict[str, Any]:
    dtype: torch.dtype = getattr(torch, own["dtype"])
    flops, bandwidth = peak_flops(dtype), peak_bandwidth()
    seconds = floor(own["hidden"], dtype.itemsize, own["requests"], top_k, flops, bandwidth)
    over_e = min(peft["cpu_s"]) / sum(seconds.values())
    return {"floor": f"b{top_k}", **seconds, "over_e": round(over_e, 2), "gflop_per_s": round(flops / 1e9, 1),
            "gb_per_s": round(bandwidth / 1e9, 1)}  # fmt: skip


def main() -> None:
    """Measure, compute, write."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    path = RESULTS / "generate.jsonl"
    lines = added([json.loads(line) for line in path.read_text().splitlines()], sys.argv[1:])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        if "floor" in line:
            print(line)


if __name__ == "__main__":
    main()
