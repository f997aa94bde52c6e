"""Versions of the relation graph in a store."""

import json
from collections.abc import Mapping
from typing import Any

from adapters_store.errors import ConflictError, GraphNotFoundError, InvalidGraphError
from adapters_store.graph import RelationGraph
from adapters_store.objects import Objects
from adapters_store.pointers import AliasRecord, Pointers, Record, Series, encode, read_json
from adapters_store.references import check_alias


class GraphRecord(Record):
    """A version of the relation graph: its node-link JSON, who put it there and when."""

    document: dict[str, Any]


class GraphStore:
    """Graph versions 1, 2, 3 … and aliases to them."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self.series = Series(objects, "graphs/versions")
        self.pointers = Pointers(objects, "graphs/aliases")

    def publish(self, document: Mapping[str, Any], alias: str | None, actor: str, expected_version: int | None) -> int:
        """Add a version; returns its number.

        Raises InvalidGraphError, and ConflictError if `expected_version` is given and not the latest (0: none yet).
        """
        plain = _plain(document)
        if alias is not None:
            check_alias(alias)
        version = self._append(GraphRecord(version=1, actor=actor, document=plain), expected_version)
        if alias is not None:
            self.pointers.move(alias, AliasRecord(version=version, actor=actor))
        return version

    def get(self, version: int | None = None) -> GraphRecord:
        """A version, by default the latest. Raises GraphNotFoundError."""
        versions = self.series.numbers()
        wanted = max(versions, default=0) if version is None else version
        if wanted not in versions:
            asked = "relation graph" if version is None else f"version {version} of the relation graph"
            has = f"it has versions {', '.join(map(str, versions))}" if versions else "publish one"
            raise GraphNotFoundError(f"the store has no {asked}; {has}")
        return read_json(self.objects, self.series.key(wanted), GraphRecord)

    def _append(self, record: GraphRecord, expected: int | None) -> int:
        if expected is None:
            return self.series.append(lambda number: _encode(record, number))
        latest = max(self.series.numbers(), default=0)
        try:
            if latest == expected:
                self.objects.create(self.series.key(expected + 1), _encode(record, expected + 1))
                return expected + 1
        except ConflictError:
            latest += 1
        raise ConflictError(f"the graph is at version {latest}, not {expected}: read it again and change that one")


def _encode(record: GraphRecord, version: int) -> bytes:
    return encode(record.model_copy(update={"version": version}))


def _plain(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document as JSON gives it back, checked. Raises InvalidGraphError."""
    RelationGraph.from_json(document)
    try:
        plain: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidGraphError(f"the graph is not plain JSON: {error}") from error
    return plain
