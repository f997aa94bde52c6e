"""The linear layers of a small Llama on few and many rows: strips next to torch's libraries over nn.Linear's layout.

All weights of the 8 x 1024 model of the generation benchmark, one after another, so that they come from memory as in a
step; milliseconds of CPU time of one thread, round-robin. Beside them what cannot be passed: the same bytes read by a
sum, and the same multiply-adds at the speed of oneDNN over weights laid out for it. Run: python -m tests.bench.linear
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from adapters_store import memory
from adapters_store.linear import Strips, linear, status
from tests.bench.generate_floor import peak_bandwidth, peak_flops, shapes
from tests.bench.generate_models import LAYERS
from tests.bench.rounds import round_robin, write

HIDDEN = 1024
ROWS = (1, 2, 4, 6, 8, 9, 12, 16, 32, 64, 128, 512)


class Layers:
    """The weights in both layouts, and an x of each width."""

    def __init__(self, dtype: torch.dtype) -> None:
        sizes = shapes(HIDDEN) * LAYERS
        self.weights = [torch.randn(d_out, d_in).to(dtype) for d_in, d_out in sizes]
        with memory.side_by_side(sum(weight.nbytes for weight in self.weights)):
            self.strips = [Strips.of(weight) for weight in self.weights]
        self.num_bytes = sum(weight.nbytes for weight in self.weights)
        self.flop_per_row = 2 * sum(weight.numel() for weight in self.weights)

    def ways(self, rows: int) -> dict[str, Callable[[], None]]:
        """What multiplies; oneDNN by torch's name for it, as torch itself takes it in float32 only where asked to."""
        dtype = self.weights[0].dtype
        inputs = {width: torch.randn(rows, width).to(dtype) for width in {weight.shape[1] for weight in self.weights}}

        def by_strips() -> None:
            for strips in self.strips:
                linear(inputs[strips.d_in], strips)

        def by(multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
            def run() -> None:
                for weight in self.weights:
                    multiply(inputs[weight.shape[1]], weight)

            return run

        return {"strips": by_strips, "torch": by(F.linear), "onednn": by(_onednn)}


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # its name
    return found


def measured(dtype: str, rounds: int) -> list[dict[str, Any]]:
    """A line for each number of rows."""
    layers = Layers(getattr(torch, dtype))
    flops, bandwidth = peak_flops(getattr(torch, dtype)), peak_bandwidth()
    lines = []
    for rows in ROWS:
        found = round_robin(layers.ways(rows), rounds, f"{dtype}, {rows} rows")
        line = {name: round(1e3 * timing.median_s, 2) for name, timing in found.items()}
        bounds = {"read": 1e3 * layers.num_bytes / bandwidth, "multiply": 1e3 * rows * layers.flop_per_row / flops}
        lines.append({"dtype": dtype, "rows": rows} | line | {name: round(ms, 2) for name, ms in bounds.items()})
    return lines


def show(lines: list[dict[str, Any]]) -> Table:
    """A row for each case."""
    table = Table("dtype", "rows", "strips, ms", "torch", "oneDNN", "reading alone", "multiplying alone")
    for line in lines:
        table.add_row(*(str(line[name]) for name in ("dtype", "rows", "strips", "torch", "onednn", "read", "multiply")))
    return table


def main() -> None:
    """Measure all cases and write results/linear.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if not status().active:
        raise SystemExit(status().detail)
    lines = [line for dtype in ("float32", "bfloat16") for line in measured(dtype, rounds)]
    Console().print(show(lines))
    print(write("linear", lines))


if __name__ == "__main__":
    main()
