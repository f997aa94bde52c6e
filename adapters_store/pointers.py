"""Numbered objects, and pointers made of them.

A series is a folder of objects 1, 2, 3 …, each made once by create-if-absent: of two writers of a number one wins, and
the other takes the next. A pointer is a series of records of which the highest counts, so moving it is atomic wherever
objects are, and its history and rollback come for nothing.
"""

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters_store.errors import ConflictError, CorruptError, NotFoundError
from adapters_store.objects import Objects
from adapters_store.references import NAME


class Record(BaseModel):
    """Who did something about a version, and when."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = Field(ge=1)
    time: datetime = Field(default_factory=lambda: datetime.now(UTC))
    actor: str = ""


class AliasRecord(Record):
    """One move of an alias to a version."""


Model = TypeVar("Model", bound=BaseModel)


def read_json(objects: Objects, key: str, model: type[Model]) -> Model:
    """The object as this model. Raises NotFoundError, or CorruptError for an object that is none."""
    try:
        return model.model_validate_json(objects.read(key))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise CorruptError(
            f"{key} is no {model.__name__}: {where}: {first['msg']}; restore it from a backup"
        ) from error


def encode(model: BaseModel) -> bytes:
    """The model as a JSON file that people may read."""
    return model.model_dump_json(indent=1).encode()


def entries(objects: Objects, folder: str) -> list[str]:
    """What lies directly in a folder, in order, whatever it is called."""
    return sorted({key.removeprefix(folder + "/").split("/")[0] for key in objects.list(folder)})


class Series:
    """Objects 1, 2, 3 … in one folder."""

    def __init__(self, objects: Objects, folder: str, digits: int = 8) -> None:
        self.objects = objects
        self.folder = folder
        self.digits = digits

    def key(self, number: int) -> str:
        """Where this number lies."""
        return f"{self.folder}/{number:0{self.digits}}.json"

    def numbers(self) -> list[int]:
        """The numbers that exist, in order. Other files in the folder are not ours and do not count."""
        stems = [key.removeprefix(self.folder + "/").removesuffix(".json") for key in self.objects.list(self.folder)]
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def append(self, make: Callable[[int], bytes], after: int = 0) -> int:
        """Create the next number, beyond `after` too; make(number) gives its bytes. Returns the number it got."""
        number = max([after, *self.numbers()]) + 1
        while True:
            try:
                self.objects.create(self.key(number), make(number))
                return number
            except ConflictError:
                number += 1


class Pointers:
    """Aliases by name, each a series of records below one folder."""

    def __init__(self, objects: Objects, folder: str) -> None:
        self.objects = objects
        self.folder = folder

    def history(self, alias: str) -> list[AliasRecord]:
        """All records, oldest first; the last is where the alias points."""
        series = self.series(alias)
        return [self._read(series, number) for number in series.numbers()]

    def all(self) -> dict[str, int]:
        """Every alias with the version it points at. Raises CorruptError if one of them cannot be read."""
        found = {alias: self.get(alias) for alias in self.names()}
        return {alias: record.version for alias, record in found.items() if record}

    def names(self) -> list[str]:
        """Aliases that have a folder, in order. Folders of other names are not ours and do not count."""
        return [entry for entry in entries(self.objects, self.folder) if NAME.match(entry)]

    def get(self, alias: str) -> AliasRecord | None:
        """Where the alias points; None if there is no such alias. Raises CorruptError if that cannot be read."""
        series = self.series(alias)
        for _ in range(3):
            numbers = series.numbers()
            if not numbers:
                return None
            with contextlib.suppress(NotFoundError):  # a move that was taken back just now: the one before counts
                return self._read(series, numbers[-1])
        raise CorruptError(f"{series.key(numbers[-1])} is listed, but not there; restore it from a backup")

    def move(self, alias: str, record: AliasRecord, after: int | None = None) -> str:
        """Point the alias elsewhere; returns the key of the record, by which a move can be taken back.

        `after` is the number of the record that must be the latest still. Raises ConflictError if it is not.
        """
        series = self.series(alias)
        if after is None:
            return series.key(series.append(lambda _: encode(record)))
        try:
            self.objects.create(series.key(after + 1), encode(record))
        except ConflictError:
            raise ConflictError(
                f"somebody else moved alias {alias!r} just now; look where it points, then decide"
            ) from None
        return series.key(after + 1)

    def series(self, alias: str) -> Series:
        """The alias's records."""
        return Series(self.objects, f"{self.folder}/{alias}", digits=7)

    def _read(self, series: Series, number: int) -> AliasRecord:
        return read_json(self.objects, series.key(number), AliasRecord)


def ways_back(versions: list[int]) -> list[int]:
    """Where rollbacks lead, nearest first, given the versions an alias was moved to.

    Moving back to where one came from undoes the last move: after 1, 2, 3, 2 the next rollback leads to 1, not to 3.
    """
    trail: list[int] = []
    for version in versions:
        if trail[-2:-1] == [version]:
            trail.pop()
        elif trail[-1:] != [version]:
            trail.append(version)
    return trail[-2::-1]
