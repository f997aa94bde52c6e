"""The folder of an evaluation: what it is of, who works on what, and a line for everything that is finished.

setting.json          what the results depend on       cells/<cell>.jsonl       a line per finished job
claims/<cell>.<job>   who has it: a process, or failed cells/<cell>/nodes/       node adapters and their heads
errors.jsonl          what failed in the last run      cells/<cell>/relations.json

A claim is a file that only one process can create. Claims are never given back while a run lasts; the next run removes
them and begins what has no line.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import ConfigError, RunError
from training.suite.plan import NODES, Cell, Job

FAILED = "failed"


class Ledger:
    """One evaluation's folder."""

    def __init__(self, folder: Path, setting: str) -> None:
        """setting: digest of what results depend on; lines of another one do not count."""
        self.folder, self.setting = folder, setting
        self._known: dict[Path, tuple[int, set[str]]] = {}  # file -> bytes read, methods found in them
        self.cells, self.claims, self.errors_file = folder / "cells", folder / "claims", folder / "errors.jsonl"

    @contextmanager
    def opened(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Begin or go on; one run at a time. Raises ConfigError if the folder is of another setting, RunError."""
        for path in (self.folder, self.cells, self.claims):
            path.mkdir(parents=True, exist_ok=True)
        self.check(identity)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"another evaluation is at work in {self.folder}; wait for it or give --out") from error
            self._clear()
            write_json(self.folder / "setting.json", identity)
            yield

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raises ConfigError if the folder has results of another setting."""
        file = self.folder / "setting.json"
        noted = json.loads(file.read_text()) if file.is_file() else dict(identity)
        changed = [name for name in identity if noted.get(name) != identity[name]]
        if changed:
            name = changed[0]
            raise ConfigError(
                f"{self.folder} has results of another setting: {name} was {noted.get(name)}, now it is "
                f"{identity[name]}; give another --out, or the setting it was begun with"
            )

    def _clear(self) -> None:
        for claim in self.claims.iterdir():
            claim.unlink()
        self.errors_file.unlink(missing_ok=True)

    def done(self) -> set[str]:
        """Keys of the jobs that have a line. Asked often, and lines may be long: only what is new is read.

        Nodes count while they are there: lines are kept and shared, nodes are large and can be made again.
        """
        return {
            f"{file.stem}.{method}"
            for file in self._files()
            for method in self._methods(file)
            if method != NODES or (self.cells / file.stem / NODES / "nodes.json").is_file()
        }

    def _methods(self, file: Path) -> set[str]:
        start, methods = self._known.get(file, (0, set()))
        if file.stat().st_size > start:
            with file.open("rb") as opened:
                opened.seek(start)
                whole = opened.read().rpartition(b"\n")[0]
            found = [_parsed(text) for text in whole.split(b"\n")]
            methods = methods | {line["method"] for line in found if line.get("setting") == self.setting}
            self._known[file] = (start + len(whole) + 1 if whole else start, methods)
        return methods

    def lines(self) -> list[dict[str, Any]]:
        """The lines of all cells."""
        return [line for file in self._files() for line in read_lines(file, self.setting)]

    def _files(self) -> list[Path]:
        return sorted(self.cells.glob("*.jsonl"))

    def add(self, cell: Cell, line: Mapping[str, Any]) -> None:
        """Append a line to a cell's file."""
        append(self.cells / f"{cell.name}.jsonl", line)

    def failed(self, job: Job, error: str) -> None:
        """Note that a job failed in this run."""
        seen = {"cell": job.cell.name, "examples": job.cell.size, "seed": job.cell.seed}
        append(self.errors_file, seen | {"method": job.method, "error": error})
        beside = self.claims / f".{job.key}"
        beside.write_text(FAILED)
        beside.replace(self.claims / job.key)

    def errors(self) -> list[dict[str, Any]]:
        """What failed in the last run."""
        return read_lines(self.errors_file)

    def claim(self, job: Job) -> bool:
        """True if the job is this process's now."""
        try:
            handle = os.open(self.claims / job.key, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(str(os.getpid()))
        return True

    def claimed(self) -> dict[str, str]:
        """Who has which job: a process's number, or FAILED."""
        return {path.name: path.read_text() for path in self.claims.iterdir() if path.name[0] != "."}

    def nodes(self, cell: Cell) -> Path:
        """Folder of a cell's node adapters."""
        return self.cells / cell.name / NODES

    def relations(self, cell: Cell) -> Path:
        """File of a cell's relations."""
        return self.cells / cell.name / "relations.json"


def append(file: Path, line: Mapping[str, Any]) -> None:
    """Add a line in one write; a line that a killed process left half is ended first."""
    data = (json.dumps(line, ensure_ascii=False, default=_plain) + "\n").encode()
    handle = os.open(file, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            data = b"\n" + data
        os.write(handle, data)
    finally:
        os.close(handle)


def read_lines(file: Path, setting: str | None = None) -> list[dict[str, Any]]:
    """The whole lines of a file, those of one setting if it is given; none if there is no file."""
    if not file.is_file():
        return []
    found = [line for text in file.read_bytes().split(b"\n") if (line := _parsed(text))]
    return [line for line in found if setting is None or line.get("setting") == setting]


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except ValueError:  # half a line of a killed process; it may end within a character
        return {}
    return value if isinstance(value, dict) else {}


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write beside its place, then rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}")
    beside.write_text(json.dumps(value, ensure_ascii=False, default=_plain) + "\n")
    beside.replace(file)


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
