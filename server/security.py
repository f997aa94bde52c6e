"""API keys: who may infer, who may administer, and for which tasks.

Keys live as SHA-256 hashes in a JSON file:
{"keys": [{"name": "web", "sha256": "…", "scopes": ["infer"], "tasks": ["books"]}]}.
Keys are random 256-bit strings, so a plain hash is enough. `python -m server.keys NAME` makes one.
Without a file the server listens on loopback only and everybody there may do everything.
"""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.errors import ForbiddenError, UnauthorizedError

Scope = Literal["infer", "admin"]


class Key(BaseModel):
    """One key. tasks None: every task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = frozenset({"infer"})
    tasks: frozenset[str] | None = None


class KeyFile(BaseModel):
    """The file of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: list[Key] = Field(min_length=1)


ANYONE = Key(name="anyone", sha256="0" * 64, scopes=frozenset({"infer", "admin"}))


class Keys:
    """Checks what a request brings. Without keys everything is allowed."""

    def __init__(self, keys: list[Key] | None) -> None:
        self._keys = keys

    @staticmethod
    def read(path: Path | None) -> "Keys":
        """Keys of a file, or none. Raises ValueError that says what is wrong with the file."""
        if path is None:
            return Keys(None)
        try:
            return Keys(KeyFile.model_validate_json(path.read_bytes()).keys)
        except OSError as error:
            raise ValueError(f"--api-keys {path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ValueError(f"--api-keys {path}: {where}: {first['msg']}; python -m server.keys makes keys") from error

    def check(self, authorization: str | None, scope: Scope) -> Key:
        """The key of an Authorization header, if it has the scope. Raises UnauthorizedError or ForbiddenError."""
        if self._keys is None:
            return ANYONE
        kind, _, token = (authorization or "").partition(" ")
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        found = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        if kind.lower() != "bearer" or not found:
            raise UnauthorizedError("send 'Authorization: Bearer <key>' with a key that this server knows")
        if scope not in found[0].scopes:
            raise ForbiddenError(f"key {found[0].name!r} lacks the scope {scope!r}")
        return found[0]


def require_tasks(allowed: frozenset[str] | None, tasks: Iterable[str | None]) -> None:
    """Let pass only what a key's list of tasks covers; None allows all. Raises ForbiddenError."""
    beyond = sorted({task for task in tasks if task} - allowed) if allowed is not None else []
    if beyond:
        raise ForbiddenError(f"this key may not use task {', '.join(beyond[:20])}")


def require_all_tasks(allowed: frozenset[str] | None) -> None:
    """Let pass only keys without a list of tasks. Raises ForbiddenError."""
    if allowed is not None:
        raise ForbiddenError("the graph is about all tasks; this key is for some of them")
