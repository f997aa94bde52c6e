"""Going through a whole store: is everything as it was published (verify), and what does nobody need (gc)."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from adapters_store.errors import ConflictError, CorruptError, EspalierError, NotFoundError
from adapters_store.graph import RelationGraph
from adapters_store.graph_store import GraphStore
from adapters_store.layout import (
    BLOBS,
    aliases_of,
    blob_key,
    foreign_entries,
    live_versions,
    names_in,
    read_manifest,
    versions_of,
)
from adapters_store.manifest import Manifest, digest_of
from adapters_store.objects import Objects
from adapters_store.pointers import Pointers
from adapters_store.tensors import TensorLimits, check_specs, read_specs

FOREIGN = "no adapter or alias can be called so: nothing reads it, gc keeps no tensors for it; move it out of the store"


@dataclass(frozen=True)
class Problem:
    """Something in a store that is not as it should be."""

    key: str
    message: str


def verify(objects: Objects) -> list[Problem]:
    """Check every manifest with its blob, every alias and every graph, and name what is foreign; nothing is changed."""
    foreign = [Problem(key, FOREIGN) for key in foreign_entries(objects)]
    return [*_verify_versions(objects), *_verify_aliases(objects), *_verify_graphs(objects), *foreign]


def _verify_versions(objects: Objects) -> Iterator[Problem]:
    for name, version in live_versions(objects):
        try:
            _check_blob(objects, read_manifest(objects, name, version))
        except EspalierError as error:
            yield Problem(versions_of(objects, name).key(version), str(error))


def _check_blob(objects: Objects, manifest: Manifest) -> None:
    """Refuse a blob that is gone, has other bytes, or holds other tensors than the manifest says."""
    try:
        data = objects.read(blob_key(manifest.blob))
    except NotFoundError as error:
        raise CorruptError(f"blob {manifest.blob} is missing") from error
    if digest_of(data) != manifest.blob:
        raise CorruptError(f"blob {manifest.blob} has other bytes, of digest {digest_of(data)}")
    check_specs(manifest.tensors, read_specs(data, TensorLimits(max_bytes=len(data))))


def _verify_aliases(objects: Objects) -> Iterator[Problem]:
    live = live_versions(objects)
    for name in names_in(objects):
        versions = [version for owner, version in live if owner == name]
        yield from _verify_pointers(aliases_of(objects, name), versions)
    graphs = GraphStore(objects)
    yield from _verify_pointers(graphs.pointers, graphs.series.numbers())


def _verify_pointers(pointers: Pointers, versions: list[int]) -> Iterator[Problem]:
    for alias in pointers.names():
        try:
            record = pointers.get(alias)
        except CorruptError as error:
            yield Problem(f"{pointers.folder}/{alias}", str(error))
            continue
        if record and record.version not in versions:
            message = f"points at version {record.version}, which is not there; it has {versions}"
            yield Problem(f"{pointers.folder}/{alias}", message)


def _verify_graphs(objects: Objects) -> Iterator[Problem]:
    graphs = GraphStore(objects)
    for version in graphs.series.numbers():
        try:
            RelationGraph.from_json(graphs.get(version).document)
        except EspalierError as error:
            yield Problem(graphs.series.key(version), str(error))


def gc(objects: Objects, before: float) -> list[str]:
    """Remove blobs that no live manifest names, and what killed writers left, if older than that; returns the keys."""
    known: dict[tuple[str, int], str] = {}
    needed = _needed(objects, known)
    removed = [key for key in objects.list(BLOBS) if key not in needed and _collect(objects, key, before, known)]
    return removed + objects.sweep(before)


def _needed(objects: Objects, known: dict[tuple[str, int], str]) -> set[str]:
    """Keys of the blobs that live versions name. `known` keeps the blob of each manifest that was read."""
    live = live_versions(objects)
    known |= {version: blob_key(read_manifest(objects, *version).blob) for version in live if version not in known}
    return {known[version] for version in live}


def _collect(objects: Objects, key: str, before: float, known: dict[tuple[str, int], str]) -> bool:
    """Remove a blob, unless it is young or a manifest came to name it meanwhile.

    Publishing looks for its blob after creating the manifest, and this looks for manifests after removing the blob:
    whoever comes second sees the other and puts the blob back.
    """
    with contextlib.suppress(NotFoundError):  # another gc was faster
        if objects.modified_at(key) <= before:
            data = objects.read(key)
            objects.delete(key)
            if key not in _needed(objects, known):
                return True
            with contextlib.suppress(ConflictError):
                objects.create(key, data)
    return False
