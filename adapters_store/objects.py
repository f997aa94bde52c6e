"""The verbs a store needs of whatever keeps its bytes: create, read, list, delete.

An object never changes once it is there, and of several creators of one key exactly one wins. That is all the store
builds on, so object storage (create-if-absent puts) can stand beside the local folder with these same verbs.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from adapters_store.errors import ConflictError, InvalidNameError, NotFoundError

_KEY_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_TEMPORARY = ".tmp-"  # no key part starts with a dot, so an unfinished object can never be taken for a finished one


class Objects(Protocol):
    """Immutable objects by key, such as `blobs/sha256/<hex>`."""

    def create(self, key: str, data: bytes) -> None:
        """Make the object, durably and all at once. Raises ConflictError if there is one already."""

    def read(self, key: str) -> bytes:
        """The object's bytes. Raises NotFoundError."""

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens if there is none."""

    def exists(self, key: str) -> bool:
        """True if there is such an object."""

    def modified_at(self, key: str) -> float:
        """When it was created, in seconds since the epoch. Raises NotFoundError."""

    def sweep(self, before: float) -> list[str]:
        """Remove what interrupted creates left behind before that time; returns what was removed."""

    def list(self, prefix: str) -> list[str]:
        """Keys below the folder `prefix`, sorted; none if there is no such folder."""


def check_key(key: str) -> str:
    """The key itself, if it is one: parts of letters, digits, '.', '_', '-' joined by '/'. Raises InvalidNameError."""
    if not all(_KEY_PART.match(part) for part in key.split("/")):
        raise InvalidNameError(
            f"object key {key!r} is not allowed: its parts must be letters, digits, '.', '_', '-', not led by a sign"
        )
    return key


class LocalObjects:
    """Objects as files under one folder, which is made when the first object is."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def create(self, key: str, data: bytes) -> None:
        """Write beside, fsync, then link into place: readers see all of it or nothing. Raises ConflictError."""
        path = self._path(key)
        _make_folder(path.parent)
        temporary = path.parent / f"{_TEMPORARY}{uuid4().hex}"
        try:
            if not path.exists():  # spares the losers of a lost race their writing; the link below is what decides
                _write_synced(temporary, data)
                path.hardlink_to(temporary)  # unlike a rename, fails if somebody was first
                return
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)
            _sync_folder(path.parent)  # the loser, too, may rely on the object from now on
        raise ConflictError(f"{key} exists already and objects never change")

    def read(self, key: str) -> bytes:
        """The object's bytes. Raises NotFoundError."""
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            raise NotFoundError(f"there is no object {key} in {self.root}") from None

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens if there is none."""
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            _sync_folder(path.parent)

    def exists(self, key: str) -> bool:
        """True if there is such an object."""
        return self._path(key).is_file()

    def modified_at(self, key: str) -> float:
        """When it was created, in seconds since the epoch. Raises NotFoundError."""
        try:
            return self._path(key).stat().st_mtime
        except FileNotFoundError:
            raise NotFoundError(f"there is no object {key} in {self.root}") from None

    def sweep(self, before: float) -> list[str]:
        """Remove temporary files that writers killed before that time left behind; returns their keys."""
        removed = []
        for path in sorted(self.root.rglob(_TEMPORARY + "*")):
            with contextlib.suppress(FileNotFoundError):  # its writer was alive after all and has just finished
                if path.stat().st_mtime <= before:
                    path.unlink()
                    removed.append(path.relative_to(self.root).as_posix())
        return removed

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    # last in the class, because its name hides the builtin from what follows
    def list(self, prefix: str) -> list[str]:
        """Keys below the folder `prefix`, sorted; unfinished objects are not among them."""
        found = []
        for folder, _, names in os.walk(self._path(prefix)):
            below = Path(folder).relative_to(self.root).as_posix()
            found += [f"{below}/{name}" for name in names if _KEY_PART.match(name)]
        return sorted(found)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _make_folder(folder: Path) -> None:
    """Make the folder and its parents, each durably: an fsynced file in a lost folder is lost."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
