"""A chunk of a prompt attends to its sequence: the native kernel next to torch's fused attention over gathered pages.

What both do is attention.py's `_chunk`, of one layer; keys and values are in pages already. Microseconds of CPU time of
one thread, round-robin. Run: python -m tests.bench.attention [--rounds 9]
"""

import argparse
import itertools
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adapters_store.packing import Scoring
from server.generation import native_attention
from server.generation.attention import attend_chunk, gathered
from server.generation.pages import PAGE, pages_for
from tests.bench.rounds import Timing, round_robin, write

DTYPES = ("float32", "bfloat16")
HEADS = ((8, 8, 64), (16, 8, 64), (32, 8, 128))  # query heads, key heads, elements of a head
CHUNKS = ((0, 16), (0, 64), (0, 256), (0, 1024), (1024, 64), (4096, 512))  # tokens before, tokens of the chunk


@dataclass(frozen=True)
class Shape:
    """One case."""

    dtype: str
    heads: int
    kv_heads: int
    d: int
    past: int
    count: int


def tensors(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query (heads, count, d), keys and values (pages, kv_heads, PAGE, d), and the table of pages, in any order."""
    generator, num_pages = torch.Generator().manual_seed(0), pages_for(shape.past + shape.count)
    dtype = getattr(torch, shape.dtype)
    query = torch.randn(shape.count, shape.heads, shape.d, generator=generator).to(dtype).transpose(0, 1)
    keys, values = (
        torch.randn(num_pages, shape.kv_heads, PAGE, shape.d, generator=generator).to(dtype) for _ in range(2)
    )
    return query, keys, values, torch.randperm(num_pages, generator=generator)


def measured(shape: Shape, rounds: int) -> dict[str, Any]:
    """One line of the results; the two must agree."""
    query, keys, values, table = tensors(shape)
    length, scoring = shape.past + shape.count, Scoring(shape.d**-0.5, is_causal=True, window=None, softcap=None)

    def native() -> Tensor:
        return native_attention.prefill(query, keys, values, table, length, scoring)

    def fused() -> Tensor:
        key, value = (gathered(part, table)[:, :length] for part in (keys, values))
        return attend_chunk(query, key, value, scoring).transpose(0, 1)

    torch.testing.assert_close(native(), fused(), rtol=2e-2, atol=2e-2)
    found = round_robin({"native": native, "torch": fused}, rounds, f"{shape.heads} heads, {shape.count} tokens")
    ratio = found["torch"].median_s / found["native"].median_s
    return (
        asdict(shape) | {name: _microseconds(timing) for name, timing in found.items()} | {"speedup": round(ratio, 2)}
    )


def _microseconds(timing: Timing) -> list[float]:
    """Median and quartiles."""
    return [round(1e6 * seconds, 1) for seconds in (timing.median_s, timing.low_s, timing.high_s)]


def show(lines: list[dict[str, Any]]) -> Table:
    """A row for each case."""
    table = Table("dtype", "heads", "before", "tokens", "native, us", "torch, us", "torch / native")
    for line in lines:
        heads = f"{line['heads']} on {line['kv_heads']} x {line['d']}"
        numbers = (line["past"], line["count"], line["native"][0], line["torch"][0], line["speedup"])
        table.add_row(line["dtype"], heads, *map(str, numbers))
    return table


def main() -> None:
    """Measure all cases and write results/attention.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    shapes = [Shape(dtype, *heads, *chunk) for dtype, heads, chunk in itertools.product(DTYPES, HEADS, CHUNKS)]
    lines = [measured(shape, rounds) for shape in shapes]
    Console().print(show(lines))
    print(write("attention", lines))


if __name__ == "__main__":
    main()
