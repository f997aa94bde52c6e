"""Results of evaluations, read from their folders: lines by suite, examples and method, ready to compare."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.errors import DataError
from training.suite.ledger import read_lines
from training.suite.plan import SETUP

Line = dict[str, Any]
Size = int | str
OURS = "ours"
Of = Callable[[Line], list[float] | None]


@dataclass(frozen=True)
class Group:
    """All lines of one suite and number of examples. relations: of its first seed that has any."""

    suite: str
    size: Size
    lines: list[Line]
    relations: Line | None = None
    all_relations: list[Line] = field(default_factory=list)

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.suite}, {told_size(self.size)}"

    @property
    def slug(self) -> str:
        """For names of files."""
        return f"{self.suite}-{self.size}".replace(" ", "-").replace("/", "-")

    @property
    def methods(self) -> list[str]:
        """Names in the order of the lines."""
        return list(dict.fromkeys(line["method"] for line in self.lines))

    @property
    def seeds(self) -> list[int]:
        """Every seed that any method has."""
        return sorted({line["seed"] for line in self.lines})

    def of(self, method: str) -> list[Line]:
        """A method's lines, one per seed."""
        return [line for line in self.lines if line["method"] == method]

    def scores(self, method: str, of: Of | None = None) -> dict[tuple[str, int], float]:
        """(task, seed) -> accuracy; of: which of a line's, None for the one that counts. Without what a line lacks."""
        return {
            (task, line["seed"]): value
            for line in self.of(method)
            if (found := (of or accuracies)(line)) is not None
            for task, value in zip(line["tasks"], found, strict=True)
        }

    @property
    def families(self) -> dict[str, str]:
        """Task -> family."""
        return {task: f for line in self.lines for task, f in zip(line["tasks"], line["families"], strict=True)}


def told_size(size: Size) -> str:
    """A number of examples in words."""
    return "all training examples" if size == "all" else f"{size} training examples per task"


def is_ours(method: str) -> bool:
    """True for our own method in all its variants."""
    return method == OURS or method.startswith(f"{OURS}-")


def is_refitted(line: Line) -> bool:
    """True if a baseline's line counts with the heads fitted anew, because that is better for it."""
    other = line.get("facts", {}).get("accuracy_refitted")
    if is_ours(line["method"]) or not isinstance(other, list) or len(other) != len(line["accuracy"]):
        return False
    return sum(other) > sum(line["accuracy"])


def accuracies(line: Line) -> list[float]:
    """Per task, what counts for a line."""
    found: list[float] = line["facts"]["accuracy_refitted"] if is_refitted(line) else line["accuracy"]
    return found


def with_own_heads(line: Line) -> list[float] | None:
    """Per task under the head that was trained with the task's own adapter; None where there is no such result."""
    if line["regime"] != "pluggable":
        return None
    found: list[float] | None = line["facts"].get("accuracy_own_heads") if is_ours(line["method"]) else line["accuracy"]
    return found


def with_our_head(line: Line) -> list[float] | None:
    """Per unknown task under the head that ours would train; None where that was not tried."""
    found: list[float] | None = line["facts"].get("accuracy_with_our_head")
    return found


def read(folders: Sequence[Path]) -> list[Line]:
    """The lines of all cells, sorted; of two of the same job the one read last. Raises DataError if there is none."""
    files = [file for folder in folders for file in sorted((folder / "cells").glob("*.jsonl"))]
    lines = {_key(line): line for file in files for line in read_lines(file) if line.get("regime") != SETUP}
    if not lines:
        raise DataError(f"{folders[0]}: no results; expected a folder that espalier-train evaluate wrote")
    return [lines[key] for key in sorted(lines)]


def _key(line: Line) -> tuple[str, str, float, int, str, str]:
    sweep = json.dumps(line.get("sweep"))
    return line["suite"], line["setting"], order(line["examples"]), line["seed"], line["method"], sweep


def order(size: Size) -> float:
    """Few examples first, all of them last."""
    return float("inf") if isinstance(size, str) else size


def groups(lines: Sequence[Line], folders: Sequence[Path]) -> list[Group]:
    """Lines without a sweep by suite and examples. Suites that ran under several settings are kept apart."""
    found: dict[tuple[str, Size], list[Line]] = {}
    names = suite_names(lines)
    for line in lines:
        if "sweep" not in line:
            found.setdefault((names[line["suite"], line["setting"]], line["examples"]), []).append(line)
    return [_group(suite, size, own, folders) for (suite, size), own in found.items()]


def _group(suite: str, size: Size, own: list[Line], folders: Sequence[Path]) -> Group:
    setting = own[0]["setting"]
    homes = [f for f in folders if any(c["setting"] == setting for c in _any_line(f))]
    files = [f / "cells" / f"{size}-{seed}" / "relations.json" for f in homes for seed in sorted(_seeds(own))]
    relations = [json.loads(file.read_text()) for file in files if file.is_file()]
    return Group(suite, size, own, relations[0] if relations else None, relations)


def _any_line(folder: Path) -> list[Line]:
    files = sorted((folder / "cells").glob("*.jsonl"))
    return [line for file in files for line in read_lines(file)[:1]]


def _seeds(lines: Iterable[Line]) -> set[int]:
    return {line["seed"] for line in lines}


def suite_names(lines: Iterable[Line]) -> dict[tuple[str, str], str]:
    """(suite, setting) -> name; with the setting in it where a suite has several."""
    pairs = list(dict.fromkeys((line["suite"], line["setting"]) for line in lines))
    several = {suite for suite, _ in pairs if sum(other == suite for other, _ in pairs) > 1}
    return {(s, setting): f"{s} (setting {setting})" if s in several else s for s, setting in pairs}
