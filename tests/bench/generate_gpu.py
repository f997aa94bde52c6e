"""Generation on a GPU at Llama-3-8B's shape, next to what the memory's bandwidth allows.

Random weights in bfloat16; each request a prompt of 512 tokens and 128 new ones, greedy; without adapters, and under 64
compositions of 64 adapters (r = 16 on all linear layers), one and four adapters each. Wall time, after a run that is
not counted. The bound of a decode step is the time to read the weights and the active adapters once, at the bandwidth
that a copy reaches on the same device.

Run: python -m tests.bench.generate_gpu. Without a GPU it writes "not run on a GPU" and that is all; --device cpu --tiny
runs the same code on a toy, and writes nothing.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

from adapters_store.language import LanguageModel
from adapters_store.mixing import Mix
from adapters_store.packing import PACKED, no_mask, packed_attention
from adapters_store.primitives import Entry, cost
from server.generation.batcher import Batcher
from server.generation.decoder import Decoder
from server.generation.pages import PAGE, pages_for
from server.generation.sampling import Draw, Sampling
from server.generation.sequence import TokenSequence
from tests.bench.rounds import RESULTS, machine

RANK, SCALE = 16, 2.0
NOT_RUN = "not run on a GPU"


@dataclass(frozen=True)
class Size:
    """What runs. shape: of the LlamaConfig."""

    shape: dict[str, Any]
    requests: Sequence[int]
    prompt: int
    new: int
    adapters: int
    step_tokens: int


LLAMA_3_8B = Size(
    {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    requests=(1, 16, 64, 256), prompt=512, new=128, adapters=64, step_tokens=8192,
)  # fmt: skip
TINY = Size(
    {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256,
    },
    requests=(1, 4), prompt=20, new=6, adapters=4, step_tokens=64,
)  # fmt: skip


def language_of(size: Size, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A random Llama, made where it runs, with all adapters resident."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, no_mask)
    torch.manual_seed(0)
    config = LlamaConfig(**size.shape, rope_theta=500000.0, tie_word_embeddings=False, bos_token_id=None,
                         eos_token_id=None, dtype=dtype)  # fmt: skip
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    language = LanguageModel(model)
    for slot in range(size.adapters):
        language.encoder.sites.put(slot, random_lora(language))
    return language


def random_lora(language: LanguageModel) -> list[Entry]:
    """A LoRA on all linear layers, made where it lies."""
    entries = []
    options = {"dtype": language.encoder.dtype, "device": language.encoder.device}
    for name, site in language.encoder.sites.items():
        if isinstance(site.place.module, nn.Linear):
            A = torch.randn(RANK, site.place.d_in, **options) / site.place.d_in**0.5
            B = torch.randn(site.place.d_out, RANK, **options) * 0.02
            entries.append(Entry(name, "lowrank", {"A": A, "B": B}, {"scale": SCALE}))
    return entries


def compositions(size: Size, top_k: int) -> list[Mix]:
    """As many as there are adapters, all different; weights of their own at each layer."""
    rng, layers = np.random.default_rng(0), size.shape["num_hidden_layers"]
    mixes = []
    for index in range(size.adapters):
        slots = sorted({(index + 9 * i) % size.adapters for i in range(top_k)})
        mixes.append(Mix(tuple(slots), rng.uniform(0.2, 1.0, (len(slots), layers)).astype(np.float32)))
    return mixes


def batcher_of(language: LanguageModel, size: Size, count: int) -> Batcher:
    """The engine, with memory for all requests at once."""
    shape = size.shape
    head = shape["hidden_size"] // shape["num_attention_heads"]
    token_bytes = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head * language.encoder.dtype.itemsize
    pages = count * (pages_for(size.prompt + size.new) + 1)
    decoder = Decoder(language, kv_bytes=pages * PAGE * token_bytes)
    return Batcher(decoder, step_tokens=size.step_tokens, max_sequences=max(256, count))


@dataclass(frozen=True)
class Timing:
    """Seconds to the last token of all; and of the steps in which all sequences decoded, with the tokens they gave."""

    seconds: float
    decode_s: float
    decode_tokens: int


def run(batcher: Batcher, size: Size, count: int, mixes: Sequence[Mix]) -> Timing:
    """All requests at once, to the end."""
    sequences = [_sequence(batcher, size, index, mixes) for index in range(count)]
    for sequence in sequences:
        batcher.add(sequence)
    start = time.perf_counter()
    decode_s, decode_tokens = 0.0, 0
    while batcher.has_work:
        step_start, is_decode = time.perf_counter(), all(sequence.remaining == 1 for sequence in sequences)
        events = batcher.step()  # ends with choices on the CPU: the device is done
        for event in events:
            if event.error is not None:
                raise event.error
        if is_decode and len(events) == count:
            decode_s += time.perf_counter() - step_start
            decode_tokens += count
    return Timing(time.perf_counter() - start, decode_s, decode_tokens)


def _sequence(batcher: Batcher, size: Size, index: int, mixes: Sequence[Mix]) -> TokenSequence:
    vocab = size.shape["vocab_size"]
    ids = [(7919 * (index + 1) + 31 * i) % (vocab - 1) + 1 for i in range(size.prompt)]
    mix = mixes[index % len(mixes)] if mixes else None
    return TokenSequence(ids, mix, Draw(Sampling(temperature=0), ids, vocab), max_tokens=size.new)


def copy_bandwidth(device: torch.device, size_bytes: int) -> float:
    """Bytes per second that a copy within the device's memory reads and writes: the best of ten."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(11):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size_bytes / min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_bytes(language: LanguageModel, mixes: Sequence[Mix], count: int) -> tuple[int, int]:
    """Bytes that a decode step must read: of weights, and of the adapters that some request uses."""
    embedding = language.encoder.model.get_input_embeddings().weight
    weights = sum(p.nbytes for p in language.model.parameters()) - embedding.nbytes  # of that, a row per token
    active = {slot for index in range(count) if mixes for slot in mixes[index % len(mixes)].slots}
    linears = [s.place for s in language.encoder.sites.values() if isinstance(s.place.module, nn.Linear)]
    one = sum(RANK * (place.d_in + place.d_out) for place in linears) * language.encoder.dtype.itemsize
    return weights, one * len(active)


def measure(batcher: Batcher, size: Size, count: int, top_k: int, rounds: int, bandwidth: float) -> dict[str, Any]:
    """One line of the results."""
    mixes = compositions(size, top_k) if top_k else []
    run(batcher, size, count, mixes)  # kernels are compiled, graphs captured
    timings = [run(batcher, size, count, mixes) for _ in range(rounds)]
    weights, adapters = step_bytes(batcher.decoder.language, mixes, count)
    graphs = getattr(batcher.decoder, "graphs", None)
    return {
        "requests": count, "mode": f"top-k {top_k}" if top_k else "none", "prompt": size.prompt, "new": size.new,
        "tokens_per_s": statistics.median(count * size.new / timing.seconds for timing in timings),
        "decode_tokens_per_s": statistics.median(timing.decode_tokens / timing.decode_s for timing in timings),
        "bound_tokens_per_s": count * bandwidth / (weights + adapters),
        "weights_bytes": weights, "adapters_bytes": adapters, "copy_bytes_per_s": bandwidth, "rounds": rounds,
        "graphs": "none" if graphs is None else graphs.failure or "replayed",
    }  # fmt: skip


def table_of(lines: Sequence[dict[str, Any]]) -> Table:
    """For people."""
    table = Table("requests", "mode", "tokens/s", "decode tokens/s", "bound", "decode of bound", "graphs")
    for line in lines:
        share = line["decode_tokens_per_s"] / line["bound_tokens_per_s"]
        numbers = (f"{line[key]:,.0f}" for key in ("tokens_per_s", "decode_tokens_per_s", "bound_tokens_per_s"))
        table.add_row(str(line["requests"]), line["mode"], *numbers, f"{share:.2f}", line["graphs"])
    return table


def write(lines: Sequence[dict[str, Any]], gpu: str) -> None:
    """Results of a GPU replace any; that there was none replaces nothing."""
    path = RESULTS / "generate_gpu.jsonl"
    if gpu == NOT_RUN and path.exists():
        return
    all_lines = [{"machine": machine() | {"gpu": gpu}}, *lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in all_lines))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy model: to see that everything runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--form", choices=("dense", "fold"), help="torch's forms of low ranks in place of the kernels")
    options = parser.parse_args()
    device, console = torch.device(options.device), Console()
    if device.type == "cuda" and not torch.cuda.is_available():
        write([{"result": NOT_RUN}], NOT_RUN)
        console.print(NOT_RUN)
        return
    size, on_gpu = TINY if options.tiny else LLAMA_3_8B, device.type == "cuda"
    language = language_of(size, device, torch.bfloat16 if on_gpu else torch.float32)
    bandwidth = copy_bandwidth(device, 4 * 2**30 if on_gpu else 64 * 2**20)
    with torch.no_grad(), cost.forced(options.form) if options.form else nullcontext():
        lines = []
        for count in size.requests:
            gc.collect()  # the memory of the last engine
            batcher = batcher_of(language, size, count)
            lines += [measure(batcher, size, count, top_k, options.rounds, bandwidth) for top_k in (0, 1, 4)]
    console.print(table_of(lines))
    if on_gpu and not options.tiny and not options.form:
        write(lines, torch.cuda.get_device_name(device))


if __name__ == "__main__":
    main()
