"""README's tables of the method, from the committed lines of `make bench-method` and `make bench-synthetic`."""

import json
from statistics import mean
from typing import Any

from tests.bench.rounds import RESULTS
from training.suite.intervals import Scores, difference

LINES = RESULTS / "method" / "results.jsonl"
HEAD = (
    "| suite, examples | single | best baseline | ours | minus single | graph renamed | shared | shared, one head "
    "| ours-joint | minus shared | graph renamed | seeds |"
)


def method() -> str:
    """Mean accuracy of each suite and number of examples: trained apart, then together."""
    found = [json.loads(line) for line in LINES.read_text().splitlines()]
    cells = sorted({(one["suite"], _number(one["examples"])) for one in found})
    rows = [_row(found, suite, examples) for suite, examples in cells]
    return "\n".join([HEAD, "|" + "---|" * (HEAD.count("|") - 1), *rows])


def _number(examples: int | str) -> float:
    return float("inf") if examples == "all" else float(examples)


def _row(found: list[dict[str, Any]], suite: str, examples: float) -> str:
    mine = [
        one for one in found if one["suite"] == suite and _number(one["examples"]) == examples and not one.get("sweep")
    ]
    scores = {name: _scores(mine, name) for name in {one["method"] for one in mine if one["accuracy"]}}
    rivals = {
        one["method"] for one in mine if one["regime"] == "pluggable" and not one["method"].startswith("ours")
    } - {"single"}
    best = max(rivals, key=lambda name: mean(scores[name].values()), default=None)
    shown = f"{mean(scores[best].values()):.3f} ({best})" if best else ""
    size = "all" if examples == float("inf") else f"{examples:g}"
    seeds = ", ".join(map(str, sorted({one["seed"] for one in mine})))
    return (
        f"| {suite}, {size} | {_mean(scores, 'single')} | {shown} | {_mean(scores, 'ours')} "
        f"| {_minus(scores, 'ours', 'single')} | {_mean(scores, 'ours-random')} | {_mean(scores, 'shared')} "
        f"| {_mean(scores, 'shared_tied')} | {_mean(scores, 'ours-joint')} | {_minus(scores, 'ours-joint', 'shared')} "
        f"| {_mean(scores, 'ours-joint-random')} | {seeds} |"
    )


def _scores(lines: list[dict[str, Any]], method: str) -> Scores:
    """(task, seed) -> accuracy; of a baseline the better of its two heads."""
    found = {}
    for line in lines:
        if line["method"] == method:
            refitted = line["facts"].get("accuracy_refitted", line["accuracy"])
            better = max(line["accuracy"], refitted, key=sum) if not method.startswith("ours") else line["accuracy"]
            found |= {(task, line["seed"]): value for task, value in zip(line["tasks"], better, strict=True)}
    return found


def _mean(scores: dict[str, Scores], method: str) -> str:
    return f"{mean(scores[method].values()):.3f}" if method in scores else ""


def _minus(scores: dict[str, Scores], a: str, b: str) -> str:
    """Difference in points with its 95 % interval over tasks and seeds."""
    found = difference(scores[a], scores[b]) if {a, b} <= set(scores) else None
    if found is None or found.t is None:
        return ""
    return f"{100 * found.mean:+.1f} [{100 * found.t[0]:+.1f}, {100 * found.t[1]:+.1f}]"


def synthetic() -> str:
    """Adapter weight precision of each world."""
    lines = [json.loads(line) for line in (RESULTS / "synthetic.jsonl").read_text().splitlines()]
    worlds = [line for line in lines if "ours" in line]
    rows = [
        f"| {w['examples']} | {w['seed']} | {w['ours']:.3f} | {w['no_graph']:.3f} | {w['random_graph']:.3f} "
        f"| {w['prior_alone']:.3f} |"
        for w in worlds
    ]
    head = "| examples per task | seed | ours | no graph | graph renamed | the prior alone |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])
