"""Progress for people: a bar on a terminal, a plain line now and then everywhere else."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, soft_wrap=True, highlight=False)


class Bar(Protocol):
    """What a long piece of work tells about itself."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """So much more is done; the note says how it goes."""

    def say(self, line: str) -> None:
        """A line that stays."""


class _RichBar:
    def __init__(self, progress: Progress, total: int, title: str) -> None:
        self._progress, self._task = progress, progress.add_task(title, total=total, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        self._progress.update(self._task, advance=count, note=note)

    def say(self, line: str) -> None:
        self._progress.console.print(line, markup=False)


class _Lines:
    """Tells every tenth of the work in a line of its own; every unit of it if each is a job."""

    def __init__(self, total: int, title: str, *, jobs: bool = False) -> None:
        self._total, self._title, self._done, self._tells = total, title, 0, total if jobs else 10

    def advance(self, count: int = 1, note: str = "") -> None:
        before, self._done = self._done, self._done + count
        if before * self._tells // max(1, self._total) != self._done * self._tells // max(1, self._total):
            say(f"{self._title}: {self._done}/{self._total} {note}".rstrip())

    def say(self, line: str) -> None:
        say(line)


class Quiet:
    """A bar that tells nothing."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Nothing to show."""

    def say(self, line: str) -> None:
        """Nothing to show."""


@contextmanager
def bar(total: int, title: str, done: int = 0, *, jobs: bool = False) -> Iterator[Bar]:
    """A bar over `total` units of work, `done` of them behind us.

    jobs: the units are long and unlike: each has a line, and their notes say how much time is left.
    """
    if not console.is_terminal:
        lines = _Lines(total, title, jobs=jobs)
        lines._done = done  # noqa: SLF001 # where a resumed run begins
        yield lines
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    columns += [] if jobs else [TimeRemainingColumn()]
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        shown = _RichBar(progress, total, title)
        shown.advance(done)
        yield shown


def say(line: str) -> None:
    """A line for people, on stderr, so that stdout is left to results."""
    console.print(line, markup=False)


def result(text: str) -> None:
    """Something a program may read, on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
