"""The likeliest token of each row from a screened head, and from all its logits, in turns.

Random heads and hidden states in the sizes of the benchmark's own two models, of SmolLM2 135M, Llama 3.2 1B and
Qwen 2.5 0.5B; milliseconds of CPU time of one thread. Between turns other memory is read, as a step reads its layers'
weights. computed: the share of the logits that bounds did not exclude.
Run: python -m tests.bench.greedy
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from adapters_store import memory
from adapters_store.likeliest import Screen
from adapters_store.linear import Strips, linear
from server.generation import weights
from tests.bench.rounds import round_robin
from tests.bench.steps import Line, main

HEADS = ((8192, 512), (8192, 1024), (49152, 576), (128256, 2048), (151936, 896))  # vocabulary, width
ROWS = (1, 4, 8, 16, 64)
OTHERS = 1 << 24  # numbers in float32: twice the third-level cache of the machine


def from_logits(x: Tensor, strips: Strips) -> Tensor:
    """As steps do it that have no screen: is there a finite one, and which."""
    logits = linear(x, strips).float()
    logits.amax(1)
    return weights.likeliest(logits)


def laid_out(vocabulary: int, width: int, dtype: torch.dtype) -> Strips:
    """A random head."""
    weight = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    with memory.side_by_side(weight.nbytes):
        return Strips.of(weight)


def measured(rounds: int) -> Iterator[Line]:
    """A line for each head, dtype and number of rows that a screen serves."""
    others = torch.randn(OTHERS)
    for vocabulary, width in HEADS:
        for dtype in (torch.float32, torch.bfloat16):
            strips = laid_out(vocabulary, width, dtype)
            with memory.side_by_side(strips.words.numel()):
                screen = Screen.of(strips)
            if screen is None:
                raise SystemExit("our bug: no screen for a finite head")
            for rows in filter(screen.pays, ROWS):
                yield _line(strips, screen, rows, others, rounds)


def _line(strips: Strips, screen: Screen, rows: int, others: Tensor, rounds: int) -> Line:
    dtype = strips.words.dtype
    x = torch.randn(rows, strips.d_in, generator=torch.Generator().manual_seed(rows)).to(dtype)
    if not torch.equal(screen.likeliest(x), from_logits(x, strips)):
        raise SystemExit("the screen found other tokens than the logits give")
    screen.counts.zero_()
    ways = {
        "others": others.sum, "logits": lambda: from_logits(x, strips),
        "others again": others.sum, "screen": lambda: screen.likeliest(x),
    }  # fmt: skip
    name = str(dtype).removeprefix("torch.")
    setting = {"vocabulary": strips.d_out, "width": strips.d_in, "dtype": name, "rows": rows}
    found = round_robin(ways, rounds, ", ".join(f"{key} {value}" for key, value in setting.items()))
    logits_s, screen_s = found["logits"].median_s, found["screen"].median_s
    computed, seen = screen.counts.tolist()
    times = {"logits_ms": round(1e3 * logits_s, 2), "screen_ms": round(1e3 * screen_s, 2)}
    return setting | times | {"saved": round(1 - screen_s / logits_s, 3), "computed": round(computed / seen, 4)}


if __name__ == "__main__":
    main("greedy", __doc__, 11, measured)
