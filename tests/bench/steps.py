"""Decoding steps of our engine by two ways, in turns: what the benchmarks of tapes and of prefetching share."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adapters_store.mixing import Mix
from server.generation.batcher import Batcher
from server.generation.pages import pages_for
from server.generation.plan import Chunk, Plan
from server.generation.sampling import Draw, Sampling
from server.generation.sequence import TokenSequence
from server.generation.taped import TapedDecode
from tests.bench.generate_models import VOCABULARY, adapters_of, llama
from tests.bench.generate_variants import engine
from tests.bench.rounds import round_robin, write

LENGTH = 200  # tokens of a sequence

Line = dict[str, Any]


def taped_engine(hidden: int, dtype: str, most_rows: int) -> tuple[Batcher, TapedDecode]:
    """An engine with 32 resident adapters, and its tapes. Exits where there are none."""
    model = llama(hidden, dtype)
    batcher = engine(model, adapters_of(model), most_rows)
    tapes = batcher.decoder.graphs
    if not isinstance(tapes, TapedDecode):
        raise SystemExit("this machine has no tapes: they need the native kernels")
    return batcher, tapes


def step_of(batcher: Batcher, mixes: Sequence[Mix | None]) -> Callable[[], None]:
    """Compute the next token of a sequence under each of these."""
    each, chunks = pages_for(LENGTH), []
    for row, mix in enumerate(mixes):
        ids = [(7 * i + 13 * row) % (VOCABULARY - 2) + 1 for i in range(LENGTH)]
        sequence = TokenSequence(ids, mix, Draw(Sampling(temperature=0), ids, VOCABULARY), max_tokens=1)
        sequence.pages = list(range(each * row, each * (row + 1)))
        chunks.append(Chunk(sequence, LENGTH - 1, 1))
    decoder = batcher.decoder

    def run() -> None:
        decoder.forward(Plan(chunks, decoder.encoder.device))

    return run


def through(batcher: Batcher, graphs: TapedDecode | None, step: Callable[[], None]) -> Callable[[], None]:
    """The step from these tapes, or without any."""

    def run() -> None:
        batcher.decoder.graphs = graphs
        step()

    return run


def compared(setting: Line, ways: dict[str, Callable[[], None]], rounds: int) -> Line:
    """The setting, the milliseconds of its two ways by name, and the share of time that the second one saves."""
    before, after = ways
    found = round_robin(ways, rounds, ", ".join(f"{name} {value}" for name, value in setting.items()))
    milliseconds = {name: round(1e3 * found[name].median_s, 2) for name in (before, after)}
    return setting | milliseconds | {"saved": round(1 - found[after].median_s / found[before].median_s, 3)}


def show(lines: Sequence[Line]) -> Table:
    """A row for each case."""
    table = Table(*lines[0])
    for line in lines:
        table.add_row(*map(str, line.values()))
    return table


def main(name: str, description: str | None, rounds: int, measured: Callable[[int], Iterable[Line]]) -> None:
    """Measure with so many rounds, or those asked for; show, and write results/{name}.jsonl."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    lines = list(measured(options.rounds))
    Console().print(show(lines))
    print(write(name, lines))
