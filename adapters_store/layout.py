"""Where things lie in a store, and how its plain parts are read.

blobs/sha256/<hex>                                 tensors (safetensors), by digest
adapters/<name>/versions/<00000003>.json           manifest of a version
adapters/<name>/aliases/<alias>/<0000007>.json     a move of an alias; the highest counts
graphs/versions/<00000002>.json                    relation graph, who put it there, when
graphs/aliases/<alias>/<0000007>.json
tombstones/adapters/<name>/<00000003>.json         a deletion; the manifest stays, so its number is never used again
quarantine/sha256/<hex>.<other hex>                bytes that were found under a digest they do not have

Folders in the place of a <name> or an <alias> that cannot be one, such as a backup `books copy`, are not read; `verify`
names them.
"""

import re

from adapters_store.errors import CorruptError
from adapters_store.manifest import Manifest
from adapters_store.objects import Objects
from adapters_store.pointers import Pointers, Series, entries, read_json
from adapters_store.references import NAME, check_name

BLOBS = "blobs/sha256"
QUARANTINE = "quarantine/sha256"
_VERSION_KEY = re.compile(r"adapters/([^/]+)/versions/(\d+)\.json\Z")
_TOMBSTONE_KEY = re.compile(r"tombstones/adapters/([^/]+)/(\d+)\.json\Z")


def blob_key(digest: str) -> str:
    """Where the bytes of this `sha256:<hex>` lie."""
    return f"{BLOBS}/{digest.removeprefix('sha256:')}"


def versions_of(objects: Objects, name: str) -> Series:
    """All manifests of a name, also of deleted versions. Raises InvalidNameError."""
    return Series(objects, f"adapters/{check_name(name)}/versions")


def tombstones_of(objects: Objects, name: str) -> Series:
    """The deleted versions of a name. Raises InvalidNameError."""
    return Series(objects, f"tombstones/adapters/{check_name(name)}")


def aliases_of(objects: Objects, name: str) -> Pointers:
    """The aliases of a name. Raises InvalidNameError."""
    return Pointers(objects, f"adapters/{check_name(name)}/aliases")


def live_versions(objects: Objects) -> list[tuple[str, int]]:
    """Name and number of every version that is not deleted, in order."""
    published = _numbered(objects, "adapters", _VERSION_KEY)
    return sorted(published - _numbered(objects, "tombstones/adapters", _TOMBSTONE_KEY))


def _numbered(objects: Objects, folder: str, pattern: re.Pattern[str]) -> set[tuple[str, int]]:
    matches = [pattern.match(key) for key in objects.list(folder)]
    return {(match[1], int(match[2])) for match in matches if match and NAME.match(match[1])}


def names_in(objects: Objects) -> list[str]:
    """Names that have a folder, in order, also such as have no version left."""
    return [entry for entry in entries(objects, "adapters") if NAME.match(entry)]


def foreign_entries(objects: Objects) -> list[str]:
    """Keys of what lies where an adapter or an alias would, but is called as none can be."""
    alias_folders = [aliases_of(objects, name).folder for name in names_in(objects)]
    folders = ["adapters", "tombstones/adapters", "graphs/aliases", *alias_folders]
    return [f"{folder}/{entry}" for folder in folders for entry in entries(objects, folder) if not NAME.match(entry)]


def read_manifest(objects: Objects, name: str, version: int) -> Manifest:
    """The manifest of a version. Raises NotFoundError, or CorruptError if it is none or another's."""
    key = versions_of(objects, name).key(version)
    manifest = read_json(objects, key, Manifest)
    if (manifest.name, manifest.version) != (name, version):
        raise CorruptError(f"{key} is the manifest of {manifest.reference}; restore it from a backup")
    return manifest
