"""The adapter store: immutable versions, movable aliases, the relation graph. See layout.py for where things lie.

Publishing writes the blob, then creates the manifest under the next free number; a crash between the two leaves bytes
that nobody refers to (`gc`). Nothing is locked: every change is one create-if-absent, so threads, processes and
replicas may share a store.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_store import collect
from adapters_store.adapter import Adapter, spec_of, unpack
from adapters_store.blobs import Blobs
from adapters_store.collect import Problem
from adapters_store.draft import draft, to_bytes
from adapters_store.errors import AdapterNotFoundError, ConflictError, CorruptError, RefusedError
from adapters_store.graph_store import GraphRecord, GraphStore
from adapters_store.layout import aliases_of, blob_key, live_versions, read_manifest, tombstones_of, versions_of
from adapters_store.manifest import Backbone, GenerationSpec, GoldenExample, Manifest
from adapters_store.objects import LocalObjects, Objects
from adapters_store.pointers import AliasRecord, Record, encode, ways_back
from adapters_store.references import Reference, check_alias, check_name, parse_reference
from adapters_store.tensors import TensorLimits, check_specs, read_tensors


class AdapterStore:
    """Adapters and graphs under one root. A root that does not exist yet is an empty store."""

    def __init__(self, root: str | Path, *, objects: Objects | None = None) -> None:
        """`objects` puts other storage in place of the folder `root`."""
        self.objects = objects or LocalObjects(root)
        self._blobs = Blobs(self.objects)
        self._graphs = GraphStore(self.objects)
        self._manifests: dict[tuple[str, int], Manifest] = {}  # manifests never change, so nothing here grows old

    def publish(
        self,
        adapter: Adapter,
        *,
        name: str,
        task: str,
        kind: str,
        backbone: Backbone,
        hyperparameters: Mapping[str, Any] = {},
        metrics: Mapping[str, float] = {},
        provenance: Mapping[str, Any] = {},
        golden: Sequence[GoldenExample] = (),
        generation: GenerationSpec | None = None,
        alias: str | None = None,
        actor: str = "",
    ) -> Manifest:
        """Add the next version of a name, and point the alias at it if one is given.

        `actor` is noted in the provenance. Raises InvalidNameError, InvalidError for facts that JSON cannot hold, and
        FormatError or TooLargeError for tensors that could not be read back.
        """
        check_name(name)
        check_name(task, "task")
        if alias is not None:
            check_alias(alias)
        packed, data = to_bytes(adapter)
        facts = {"name": name, "task": task, "kind": kind, "backbone": backbone, "golden": tuple(golden)}
        facts["generation"] = generation
        noted = dict(provenance) | ({"actor": actor} if actor else {})
        more = {"hyperparameters": dict(hyperparameters), "metrics": dict(metrics), "provenance": noted}
        version = self._add(draft(packed, data, facts | more), data)
        if alias is not None:
            self.set_alias(name, alias, version, actor)
        return self._manifest(name, version)

    def resolve(self, reference: str | Reference) -> Manifest:
        """The manifest that a reference means now. Raises InvalidNameError, AdapterNotFoundError naming what exists."""
        asked = parse_reference(reference) if isinstance(reference, str) else reference
        versions = self.versions(asked.name)
        if not versions:
            raise AdapterNotFoundError(f"no adapter {asked.name!r}; the store has: {_listed(self.names())}")
        if asked.digest:
            return self._by_digest(asked, versions)
        latest = versions[-1] if asked.version is None else asked.version
        version = self._aliased(asked.name, asked.alias) if asked.alias else latest
        self._require(asked, version, versions)
        return self._manifest(asked.name, version)

    def load(self, manifest: Manifest) -> Adapter:
        """The adapter of a manifest, its bytes checked. Raises CorruptError; corrupt bytes are quarantined."""
        try:
            data = self._blobs.get(manifest.blob)
            tensors = read_tensors(data, TensorLimits(max_bytes=len(data)))
            check_specs(manifest.tensors, {name: spec_of(tensor) for name, tensor in tensors.items()})
            return unpack(manifest.sites, manifest.head, tensors)
        except (CorruptError, RefusedError) as error:
            raise CorruptError(f"{manifest.reference} cannot be loaded: {error}") from error

    def names(self) -> list[str]:
        """Names that have a version."""
        return sorted({name for name, _ in live_versions(self.objects)})

    def versions(self, name: str) -> list[int]:
        """Versions of a name that are published and not deleted, in order; none for an unknown name."""
        deleted = tombstones_of(self.objects, name).numbers()
        return [number for number in versions_of(self.objects, name).numbers() if number not in deleted]

    def aliases(self, name: str) -> dict[str, int]:
        """Aliases of a name and the versions they point at. Raises CorruptError if one of them cannot be read."""
        return aliases_of(self.objects, name).all()

    def alias_names(self, name: str) -> list[str]:
        """Aliases of a name, also such as cannot be read."""
        return aliases_of(self.objects, name).names()

    def alias(self, name: str, alias: str) -> int | None:
        """The version that an alias points at; None if there is no such alias. Raises CorruptError."""
        record = aliases_of(self.objects, name).get(check_alias(alias))
        return record.version if record else None

    def alias_history(self, name: str, alias: str) -> list[AliasRecord]:
        """Every move of an alias, oldest first; none for an unknown alias."""
        return aliases_of(self.objects, name).history(check_alias(alias))

    def set_alias(self, name: str, alias: str, version: int, actor: str = "") -> AliasRecord:
        """Point an alias at a version. Raises AdapterNotFoundError if there is no such version."""
        check_alias(alias)
        self._require(Reference(name, version=version), version, self.versions(name))
        return self._move(name, alias, AliasRecord(version=version, actor=actor))

    def rollback(self, name: str, alias: str, actor: str = "") -> AliasRecord:
        """Point an alias at the version it came from; once more leads further back. Deleted versions are skipped.

        Raises AdapterNotFoundError if there is nothing to go back to, ConflictError if somebody moves it just now.
        """
        numbers = aliases_of(self.objects, name).series(check_alias(alias)).numbers()
        been = [record.version for record in self.alias_history(name, alias)]
        live = self.versions(name)
        earlier = [version for version in ways_back(been) if version in live]
        if not earlier:
            raise AdapterNotFoundError(
                f"{name}@{alias} has nothing to roll back to; it has pointed at: {_listed(been)}"
            )
        return self._move(name, alias, AliasRecord(version=earlier[0], actor=actor), after=numbers[-1])

    def delete(self, name: str, version: int, actor: str = "") -> None:
        """Delete a version: it resolves no more, its number stays taken, its bytes go with the next `gc`.

        Raises AdapterNotFoundError if there is no such version, ConflictError while an alias points at it.
        """
        self._require(Reference(name, version=version), version, self.versions(name))
        self._refuse_aliased(name, version)
        key = tombstones_of(self.objects, name).key(version)
        self.objects.create(key, encode(Record(version=version, actor=actor)))
        try:
            self._refuse_aliased(name, version)  # an alias that moved here just before the tombstone wins
        except ConflictError:
            self.objects.delete(key)
            raise

    def publish_graph(
        self,
        document: Mapping[str, Any],
        alias: str | None = None,
        actor: str = "",
        expected_version: int | None = None,
    ) -> int:
        """Add a version of the relation graph, given as node-link JSON; returns its number.

        Raises InvalidGraphError, and ConflictError if `expected_version` is given and not the latest (0: none yet).
        """
        return self._graphs.publish(document, alias, actor, expected_version)

    def graph(self, version: int | None = None) -> tuple[int, dict[str, Any]]:
        """Number and node-link JSON of a graph version, by default the latest. Raises GraphNotFoundError."""
        record = self._graphs.get(version)
        return record.version, record.document

    def graph_record(self, version: int | None = None) -> GraphRecord:
        """The same with who put it there and when. Raises GraphNotFoundError."""
        return self._graphs.get(version)

    def graph_versions(self) -> list[int]:
        """Graph versions in order."""
        return self._graphs.series.numbers()

    def graph_aliases(self) -> dict[str, int]:
        """Aliases of graph versions."""
        return self._graphs.pointers.all()

    def verify(self) -> list[Problem]:
        """Everything that is not as it was published; nothing is changed. Reads every blob."""
        return collect.verify(self.objects)

    def gc(self, grace_s: float = 3600, now: float | None = None) -> list[str]:
        """Remove what nothing refers to and is older than `grace_s`; returns the keys.

        The grace must be longer than the longest publishing. Raises CorruptError, removing no blob, while a manifest
        cannot be read: what it refers to is not known.
        """
        return collect.gc(self.objects, before=(time.time() if now is None else now) - grace_s)

    def _add(self, manifest: Manifest, data: bytes) -> int:
        """Blob first, then the manifest under the next free number; returns the number."""
        self._blobs.put(data)
        deleted = tombstones_of(self.objects, manifest.name).numbers()
        version = versions_of(self.objects, manifest.name).append(
            lambda number: encode(manifest.model_copy(update={"version": number})), after=max(deleted, default=0)
        )
        # a gc that began before the manifest was there may just have taken the blob for garbage
        if not self.objects.exists(blob_key(manifest.blob)):
            self._blobs.put(data)
        return version

    def _manifest(self, name: str, version: int) -> Manifest:
        if (name, version) not in self._manifests:
            self._manifests[name, version] = read_manifest(self.objects, name, version)
        return self._manifests[name, version]

    def _aliased(self, name: str, alias: str) -> int:
        version = self.alias(name, alias)
        if version is None:
            has = _listed(self.alias_names(name))
            raise AdapterNotFoundError(f"{name} has no alias {alias!r}; its aliases: {has}")
        return version

    def _by_digest(self, asked: Reference, versions: Sequence[int]) -> Manifest:
        """The newest version with a digest that begins so: versions of one digest answer alike."""
        manifests = [self._manifest(asked.name, version) for version in versions]
        found = {m.digest: m for m in manifests if m.digest.startswith(str(asked.digest))}
        if len(found) != 1:
            problem = "fits several versions, give more digits" if found else "fits no version"
            has = _listed([f"{m.version} ({m.digest[:19]})" for m in manifests])
            raise AdapterNotFoundError(f"{asked} {problem}; {asked.name} has versions: {has}")
        return found.popitem()[1]

    def _require(self, asked: Reference, version: int, versions: Sequence[int]) -> None:
        if version in versions:
            return
        if version in tombstones_of(self.objects, asked.name).numbers():
            raise AdapterNotFoundError(
                f"{asked.name}@{version} was deleted; {asked.name} has versions: {_listed(versions)}"
            )
        raise AdapterNotFoundError(f"{asked} is not in the store; {asked.name} has versions: {_listed(versions)}")

    def _move(self, name: str, alias: str, record: AliasRecord, after: int | None = None) -> AliasRecord:
        key = aliases_of(self.objects, name).move(alias, record, after)
        if record.version not in self.versions(name):
            self.objects.delete(key)
            raise ConflictError(
                f"{name}@{record.version} was deleted while {alias!r} moved to it; choose another version"
            )
        return record

    def _refuse_aliased(self, name: str, version: int) -> None:
        pointing = [alias for alias, target in self.aliases(name).items() if target == version]
        if pointing:
            raise ConflictError(f"{name}@{version} is what {_listed(pointing)} points at; move the alias, then delete")


def _listed(items: Iterable[object]) -> str:
    """Up to 20 of the items for a message."""
    texts = [str(item) for item in items]
    return ", ".join(texts[:20]) + (f" and {len(texts) - 20} more" if len(texts) > 20 else "") if texts else "none"
