"""Co-training all tasks in one mixed batch, next to PEFT and transformers' Trainer on one task after another.

The 16 tasks of fdu_mtl and the 10 of clinc150_domains, all-MiniLM-L6-v2, texts of at most 96 tokens, LoRA r=8 alpha=16
on the same linear layers of the same blocks, a head per task, 8 texts per task and step, AdamW; adapters in float32.
PEFT's side runs every second task (the same share of long texts) and computes the blocks below the adapters in every
step, as Trainer does; ours reads them once per text, which is charged to it in shares of `--epochs`. CPU seconds of one
thread, or with `--threads 2` seconds on the clock; each side is a process, and the sides take turns step by step. Ours
keeps freed memory, as its commands do (training/memory.py). Run: python -m tests.bench.cotrain_cost [--rounds 3]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.rounds import RESULTS, write

DATA = Path("../shared/data")
FOLDERS = ("fdu_mtl", "clinc150_domains")
SIDES = (
    "ours, prior", "ours, 8 neighbours", "ours, apart", "peft", "peft, autocast", "kept memory: peft, autocast", "bare",
    "products of ours, prior",
)  # fmt: skip
BATCH = 8


@dataclass(frozen=True)
class Case:
    """One comparison. first_layer: adapters act from this block on; sites: all-linear, or query,value."""

    dtype: str
    first_layer: int
    sites: str
    threads: int
    data: Path

    @property
    def key(self) -> tuple[object, ...]:
        """What tells its lines from those of others."""
        return self.dtype, self.first_layer, self.sites, self.threads

    def setting(self) -> str:
        """What the sides' Setting is made of."""
        data = [str(self.data / name) for name in FOLDERS]
        return json.dumps(
            {"data": data, "examples": BATCH, "test_examples": 1, "dtype": self.dtype, "first_layer": self.first_layer}
        )


class Process:
    """A side in its own process. `said`: what it told when it was ready."""

    def __init__(self, side: str, case: Case, rounds: int) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "tests.bench.cotrain_sides", "--side", side]
        command += ["--setting", case.setting(), "--rounds", str(rounds)]
        command += ["--sites", case.sites, "--threads", str(case.threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(case.threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.said: dict[str, Any] = json.loads(self._line())

    def _line(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise SystemExit("a side of the benchmark ended early; see its message above")
        return line

    def turn(self) -> dict[str, Any]:
        """Let it run for a turn."""
        if self._process.stdin:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._line())
        return found

    def end(self) -> None:
        """No more turns."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()


def run_case(case: Case, rounds: int, epochs: int) -> list[dict[str, Any]]:
    """All sides of one comparison, round-robin."""
    sides = [side for side in SIDES if "autocast" not in side or case.dtype == "bfloat16"]
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with ExitStack() as stack:
        running = {}
        for side in sides:
            running[side] = Process(side, case, rounds)
            stack.callback(running[side].end)
        for _ in range(rounds):
            for side, process in running.items():
                turns[side].append(process.turn())
                print(*case.key, side, turns[side][-1], file=sys.stderr, flush=True)
        said = {side: process.said for side, process in running.items()}
    return [_line(case, side, turns[side], said[side], epochs) for side in sides]


def _line(case: Case, side: str, turns: Sequence[dict[str, Any]], said: dict[str, Any], epochs: int) -> dict[str, Any]:
    """Medians over rounds; what ours reads once is charged in shares."""
    per_example = statistics.median(turn["seconds"] / turn["examples"] for turn in turns)
    once = said["reading_s_per_text"] / epochs if "ours" in side and case.first_layer else 0.0
    return {
        "dtype": case.dtype, "first_layer": case.first_layer, "sites": case.sites, "threads": case.threads,
        "side": side, "rounds": len(turns),
        "tasks": said["tasks"], "tokens_per_step": said["tokens"], "examples_per_turn": turns[0]["examples"],
        "examples_per_s": round(1 / (per_example + once), 1),
        "examples_per_s_of_steps": round(1 / per_example, 1),
        "per_turn": [round(turn["examples"] / turn["seconds"], 1) for turn in turns],
        "peak_mb": turns[-1]["peak_mb"], "epochs_that_share_reading": epochs,
    }  # fmt: skip


def show(lines: Sequence[dict[str, Any]]) -> None:
    """A row per side."""
    table = Table("dtype", "blocks", "sites", "threads", "side", "examples/s", "over PEFT", "peak MB", "rounds")
    for one in lines:
        table.add_row(
            one["dtype"], f"{one['first_layer']} up", one["sites"], str(one["threads"]), one["side"],
            f"{one['examples_per_s']:.1f}",
            f"{over_peft(lines, one):.2f}", str(one["peak_mb"]), str(one["rounds"]),
        )  # fmt: skip
    Console(width=110).print(table)


def over_peft(lines: Sequence[dict[str, Any]], one: dict[str, Any]) -> float:
    """Its examples per second over those of the faster of PEFT's ways in the same run."""
    same = [other for other in lines if _key(other) == _key(one)]
    best = max(other["examples_per_s"] for other in same if other["side"].startswith("peft"))
    return float(one["examples_per_s"] / best)


def _key(line: dict[str, Any]) -> tuple[object, ...]:
    return line["dtype"], line["first_layer"], line["sites"], line["threads"]


def main() -> None:
    """Run, write after each comparison, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--first-layer", nargs="*", type=int, default=[3, 0])
    parser.add_argument("--sites", nargs="*", default=["all-linear"], help="all-linear, query,value, or both")
    parser.add_argument("--threads", nargs="*", type=int, default=[1])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--keep", action="store_true", help="keep the other comparisons of the results file")
    options = parser.parse_args()
    asked = product(options.sites, options.threads, options.first_layer, options.dtype)
    cases = [Case(dtype, first, sites, threads, options.data) for sites, threads, first, dtype in asked]
    lines = _kept(cases) if options.keep else []
    for case in cases:
        lines += run_case(case, options.rounds, options.epochs)
        print(write("cotrain_cost", lines))
    show(lines)


def _kept(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The committed lines of other comparisons."""
    path = RESULTS / "cotrain_cost.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    return [one for one in found if _key(one) not in {case.key for case in cases}]


if __name__ == "__main__":
    main()
