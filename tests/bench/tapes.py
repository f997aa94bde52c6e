"""A decoding step from a tape, next to the same step through Python: milliseconds of CPU time of one thread, in turns.

Random Llamas of 8 layers, sequences of 200 tokens, no adapters or one of 32 for each row (rank 16, all linear layers).
The least of what Python costs shows where nothing else costs much: few rows, a small model.
Run: python -m tests.bench.tapes
"""

import argparse
from collections.abc import Callable, Sequence
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
from tests.bench.generate_models import LAYERS, VOCABULARY, adapters_of, llama
from tests.bench.generate_variants import engine
from tests.bench.rounds import round_robin, write

MODELS = ((256, "float32"), (512, "float32"), (512, "bfloat16"), (1024, "float32"), (1024, "bfloat16"))
ROWS = (1, 4, 9, 16)
LENGTH = 200


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


def measured(hidden: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """A line for each number of rows, without and with adapters."""
    model = llama(hidden, dtype)
    batcher = engine(model, adapters_of(model), max(ROWS))
    tapes, lines = batcher.decoder.graphs, []
    if not isinstance(tapes, TapedDecode):
        raise SystemExit("this machine has no tapes: they need the native kernels")
    for rows in ROWS:
        for has_adapters in (False, True):
            mixes = [Mix.one_hot(2 * row, LAYERS) if has_adapters else None for row in range(rows)]
            step = step_of(batcher, mixes)
            ways = {"python": through(batcher, None, step), "tape": through(batcher, tapes, step)}
            label = f"{hidden} {dtype}, {rows} rows{', adapters' * has_adapters}"
            found = round_robin(ways, rounds, label)
            milliseconds = {name: round(1e3 * timing.median_s, 2) for name, timing in found.items()}
            saved = round(1 - found["tape"].median_s / found["python"].median_s, 3)
            setting = {"width": hidden, "dtype": dtype, "rows": rows, "adapters": has_adapters}
            lines.append(setting | milliseconds | {"saved": saved})
    return lines


def show(lines: list[dict[str, Any]]) -> Table:
    """A row for each case."""
    table = Table("width", "dtype", "rows", "adapters", "python, ms", "tape, ms", "saved")
    for line in lines:
        table.add_row(*map(str, line.values()))
    return table


def main() -> None:
    """Measure all cases and write results/tapes.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    lines = [line for hidden, dtype in MODELS for line in measured(hidden, dtype, rounds)]
    Console().print(show(lines))
    print(write("tapes", lines))


if __name__ == "__main__":
    main()
