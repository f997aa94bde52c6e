"""Names of adapters and references to their versions.

A name is an identifier, never a path: `[a-z0-9][a-z0-9._-]{0,63}`.
A reference is `books` or `books@latest` (the latest version), `books@3`, `books@prod` or `books@sha256:<hex>`.
"""

import re
from dataclasses import dataclass

from adapters_store.errors import InvalidNameError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
_DIGEST = re.compile(r"sha256:[0-9a-f]{12,64}\Z")
_VERSION = re.compile(r"[1-9][0-9]{0,7}\Z")


@dataclass(frozen=True)
class Reference:
    """One of: version, alias, digest (a prefix of 12 hex digits or more); none of them means the latest version."""

    name: str
    version: int | None = None
    alias: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        """The reference as it is written."""
        selector = self.version or self.alias or self.digest
        return f"{self.name}@{selector}" if selector else self.name


def check_name(name: str, what: str = "adapter") -> str:
    """The name itself, if it is one. Raises InvalidNameError."""
    if not NAME.match(name):
        raise InvalidNameError(
            f"{what} name {name!r} is not allowed: use 1 to 64 of a-z, 0-9, '.', '_', '-', the first a letter or digit"
        )
    return name


def parse_reference(text: str) -> Reference:
    """What `books`, `books@3`, `books@prod` or `books@sha256:…` refers to. Raises InvalidNameError."""
    name, at, selector = text.partition("@")
    check_name(name)
    if not at or selector == "latest":
        return Reference(name)
    if _VERSION.match(selector):
        return Reference(name, version=int(selector))
    if _DIGEST.match(selector):
        return Reference(name, digest=selector)
    return Reference(name, alias=check_alias(selector))


def check_alias(alias: str) -> str:
    """The alias itself, if it is one: a name that is neither a number nor `latest`. Raises InvalidNameError."""
    check_name(alias, "alias")
    if alias.isdigit() or alias == "latest":
        raise InvalidNameError(f"alias {alias!r} is not allowed: numbers are versions, and 'latest' is implied")
    return alias
