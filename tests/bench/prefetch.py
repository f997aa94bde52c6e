"""A decoding step whose linear layers ask for the factors that are read next, and the same without asking, in turns.

Random Llamas of 8 layers, sequences of 200 tokens, each under a composition of one or four of 32 adapters (rank 16, all
linear layers); milliseconds of CPU time of one thread.
Run: python -m tests.bench.prefetch
"""

import argparse
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from adapters_store import linear
from server.generation.taped import TapedDecode
from tests.bench.generate_models import adapters_of, compositions, llama
from tests.bench.generate_variants import engine
from tests.bench.rounds import round_robin, write
from tests.bench.tapes import step_of, through

MODELS = ((512, "float32"), (1024, "float32"), (1024, "bfloat16"))
ROWS = (12, 14, 16, 24, 32, 64)


def measured(hidden: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """A line for each number of rows and of adapters in a composition."""
    model = llama(hidden, dtype)
    batcher = engine(model, adapters_of(model), max(ROWS))
    asking, lines = batcher.decoder.graphs, []
    if not isinstance(asking, TapedDecode):
        raise SystemExit("this machine has no tapes: they need the native kernels")
    silent = batcher.decoder._taped(batcher.decoder.max_length)
    for rows in ROWS:
        for top_k in (1, 4):
            step = step_of(batcher, compositions(rows, top_k))
            ways = {"silent": through(batcher, silent, step), "asking": through(batcher, asking, step)}
            with mock.patch.object(linear, "_IDLE", max(ROWS) + 1):
                ways["silent"]()  # records
            found = round_robin(ways, rounds, f"{hidden} {dtype}, {rows} rows, top-{top_k}")
            milliseconds = {name: round(1e3 * timing.median_s, 2) for name, timing in found.items()}
            saved = round(1 - found["asking"].median_s / found["silent"].median_s, 3)
            setting = {"width": hidden, "dtype": dtype, "rows": rows, "adapters": top_k}
            lines.append(setting | milliseconds | {"saved": saved})
    return lines


def show(lines: list[dict[str, Any]]) -> Table:
    """A row for each case."""
    table = Table("width", "dtype", "rows", "adapters", "silent, ms", "asking, ms", "saved")
    for line in lines:
        table.add_row(*map(str, line.values()))
    return table


def main() -> None:
    """Measure all cases and write results/prefetch.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    lines = [line for hidden, dtype in MODELS for line in measured(hidden, dtype, rounds)]
    Console().print(show(lines))
    print(write("prefetch", lines))


if __name__ == "__main__":
    main()
