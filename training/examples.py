"""Examples: the lines of a task's files. A text with its label, or a prompt with the completion that should follow."""

import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from training.errors import DataError


@dataclass(frozen=True)
class Line:
    """What all examples have in common."""

    @property
    def key(self) -> object:
        """What must not be in two splits, nor twice in one."""
        return self

    @property
    def stratum(self) -> str:
        """What samples keep the shares of."""
        return ""

    @property
    def fields(self) -> list[str]:
        """The example as a digest reads it."""
        return list(astuple(self))


@dataclass(frozen=True)
class Example(Line):
    """A text and the name of its label: a line of a task that classifies."""

    text: str
    label: str

    @property
    def key(self) -> object:
        """The text, whatever its label."""
        return self.text

    @property
    def stratum(self) -> str:
        """The label."""
        return self.label


@dataclass(frozen=True)
class Pair(Line):
    """A prompt and its completion: a line of a task that generates. One prompt may have several completions."""

    prompt: str
    completion: str


Split = tuple[Example | Pair, ...]
Sort = type[Example] | type[Pair]

_LINE = {Example: '{"text": "…", "label": "…"}', Pair: '{"prompt": "…", "completion": "…"}'}
_WANTED = {
    Example: "a string as text and a string or whole number as label",
    Pair: "a string as prompt and a string that is not empty as completion",
}


def read(file: Path, sort: Sort | None = None) -> Split:
    """The examples of a file, none if there is no file; all of the sort, or of that of the first. Raises DataError."""
    return tuple(_lines(file, sort)) if file.is_file() else ()


def _lines(file: Path, sort: Sort | None) -> Iterator[Example | Pair]:
    with file.open(encoding="utf-8", newline="\n") as lines:  # texts may hold other line ends that JSON allows
        for number, line in enumerate(lines, 1):
            if line.strip():
                example = _parse(line, f"{file}:{number}", sort)
                sort = type(example)
                yield example


def _parse(line: str, where: str, sort: Sort | None) -> Example | Pair:
    sorts: tuple[Sort, ...] = (sort,) if sort else (Example, Pair)
    expected = f"{where}: expected {' or '.join(_LINE[one] for one in sorts)}"
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{expected}, but this is not JSON: {error.msg} at column {error.colno}") from error
    fitting = [example for example in (_example(row), _pair(row)) if example]
    if len(fitting) == 1 and type(fitting[0]) in sorts:
        return fitting[0]
    found = f"keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
    if fitting:
        raise DataError(f"{expected}, as all lines of a task are of one sort, found {found}")
    raise DataError(f"{expected} with {' or '.join(_WANTED[one] for one in sorts)}, found {found}")


def _example(row: Any) -> Example | None:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not _is_label(row.get("label")):
        return None
    return Example(row["text"], str(row["label"]))


def _pair(row: Any) -> Pair | None:
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("prompt", "completion")):
        return None
    return Pair(row["prompt"], row["completion"]) if row["completion"] else None


def _is_label(value: object) -> bool:
    return (isinstance(value, str) and value != "") or (isinstance(value, int) and not isinstance(value, bool))


def labelled(split: Split) -> list[Example]:
    """The examples of a task that classifies."""
    found = [example for example in split if isinstance(example, Example)]
    if len(found) < len(split):
        raise AssertionError("our bug: pairs in a task that classifies")
    return found


def paired(split: Split) -> list[Pair]:
    """The examples of a task that generates."""
    found = [example for example in split if isinstance(example, Pair)]
    if len(found) < len(split):
        raise AssertionError("our bug: labels in a task that generates")
    return found
