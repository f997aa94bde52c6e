"""The sides of cotrain_cost.py, each in a process of its own, so that each has a peak of memory of its own.

They take turns step by step: a line on stdin is a turn, the answer is a line of JSON with the seconds it took. What
no side is charged for (imports, reading and tokenising texts, loading models, Trainer's start-up) lies outside turns.
"""

import argparse
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests.bench.cotrain_ours import apart_side, bare_side, narrow_side, prior_side, products_side
from tests.bench.cotrain_peft import TARGETS, peft_autocast_side, peft_kept_side, peft_side
from tests.bench.cotrain_turns import Turns, now
from training.memory import keep_freed
from training.suite.workbench import Setting, Workbench, prepare

Side = Callable[[Workbench, str, int, Turns], None]
SIDES: dict[str, Side] = {
    "ours, prior": prior_side,
    "ours, 8 neighbours": narrow_side,
    "ours, apart": apart_side,
    "peft": peft_side,
    "peft, autocast": peft_autocast_side,
    "kept memory: peft, autocast": peft_kept_side,
    "bare": bare_side,
    "products of ours, prior": products_side,
}


class _Lines:
    """Turns over stdin and stdout. An empty line is a turn; the end of stdin ends the process."""

    def wait(self) -> bool:
        if not sys.stdin.readline():
            sys.exit(0)
        return True

    def tell(self, seconds: float, examples: int) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "examples": examples, "peak_mb": round(peak)}), flush=True)


def reading_seconds(bench: Workbench) -> float:
    """Seconds per text of what lies below the tail's first block: ours computes it once per text."""
    rows = [row for texts in bench.train for row in texts.rows]
    began = now()
    bench.tail.read(rows, bench.setting.token_budget)
    return (now() - began) / len(rows)


def main() -> None:
    """One side: says what it has read, then takes its turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--setting", type=json.loads, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--sites", choices=TARGETS, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.side.startswith("peft"):
        keep_freed()  # as our commands do
    setting = options.setting | {"data": tuple(map(Path, options.setting["data"]))}
    bench = prepare(Setting(**setting))
    tokens = sum(len(row) for texts in bench.train for row in texts.rows)
    said = {"tasks": len(bench.tasks), "tokens": tokens, "reading_s_per_text": reading_seconds(bench)}
    print(json.dumps(said), flush=True)
    SIDES[options.side](bench, options.sites, options.rounds, _Lines())


if __name__ == "__main__":
    main()
