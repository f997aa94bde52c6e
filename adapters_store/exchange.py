"""Adapters outside a store: a folder of `manifest.json` and `tensors.safetensors`.

The same two files are what `export` writes, `publish` reads and clients upload. Where an adapter comes from decides
nothing: name, version, time and size in the file are for people, and the store gives its own.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapters_store.adapter import Adapter, spec_of, unpack
from adapters_store.draft import to_bytes
from adapters_store.errors import CorruptError, FormatError, KeysError, TooLargeError
from adapters_store.manifest import Manifest, digest_of
from adapters_store.pointers import encode
from adapters_store.tensors import LIMITS, TensorLimits, check_specs, read_tensors

MANIFEST_FILE = "manifest.json"
TENSORS_FILE = "tensors.safetensors"
MAX_MANIFEST_BYTES = 8 << 20


def write_folder(folder: str | Path, manifest: Manifest, adapter: Adapter) -> None:
    """Write an adapter as a folder, made if need be; files of the same names are replaced."""
    packed, data = to_bytes(adapter)
    contents = {"sites": packed.sites, "head": packed.head, "tensors": packed.specs}
    written = manifest.model_copy(update={**contents, "blob": digest_of(data), "size_bytes": len(data)})
    Path(folder).mkdir(parents=True, exist_ok=True)
    _replace(Path(folder) / TENSORS_FILE, data)
    _replace(Path(folder) / MANIFEST_FILE, encode(written))


def read_folder(folder: str | Path, limits: TensorLimits = LIMITS) -> tuple[Manifest, Adapter]:
    """The adapter in a folder. Raises FormatError without the two files, and what read_parts raises."""
    paths = [Path(folder) / MANIFEST_FILE, Path(folder) / TENSORS_FILE]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FormatError(f"{folder} has no {' and no '.join(missing)}; expected a folder as `export` writes it")
    return read_parts(paths[0].read_bytes(), paths[1].read_bytes(), limits)


def read_parts(manifest_json: bytes, tensors: bytes, limits: TensorLimits = LIMITS) -> tuple[Manifest, Adapter]:
    """The manifest and adapter in the bytes of the two files; blob, size and absent facts are filled in.

    Raises FormatError or KeysError naming the field, TooLargeError, ShapeError for tensors that are not as the
    manifest says, and CorruptError if it names another blob.
    """
    document = _document(manifest_json)
    loaded = read_tensors(tensors, limits)
    manifest = _manifest(document, tensors)
    check_specs(manifest.tensors, {name: spec_of(tensor) for name, tensor in loaded.items()})
    return manifest, unpack(manifest.sites, manifest.head, loaded)


def _document(manifest_json: bytes) -> dict[str, Any]:
    if len(manifest_json) > MAX_MANIFEST_BYTES:
        raise TooLargeError(f"{MANIFEST_FILE} has {len(manifest_json)} bytes, the limit is {MAX_MANIFEST_BYTES}")
    try:
        document = json.loads(manifest_json)
        json.dumps(document, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{MANIFEST_FILE} is no JSON that can be read: {error}") from error
    if not isinstance(document, dict):
        raise FormatError(f"{MANIFEST_FILE} must be a JSON object, a {type(document).__name__} came")
    return document


def _manifest(document: dict[str, Any], tensors: bytes) -> Manifest:
    blob = digest_of(tensors)
    if document.get("blob", blob) != blob:
        names = repr(document["blob"])[:80]
        raise CorruptError(
            f"{MANIFEST_FILE} names blob {names}, the tensors have {blob}; send files that belong together"
        )
    known = {"name": "unnamed", "version": 1, "created_at": datetime.now(UTC).isoformat()}
    filled = known | document | {"blob": blob, "size_bytes": len(tensors)}
    try:
        return Manifest.model_validate_json(json.dumps(filled), strict=True)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> FormatError | KeysError:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the whole"
    if first["type"] in {"missing", "extra_forbidden"}:
        problem = "is missing" if first["type"] == "missing" else "is not known"
        return KeysError(f"{MANIFEST_FILE}: field {where} {problem}")
    return FormatError(f"{MANIFEST_FILE}: field {where}: {first['msg']}, {repr(first['input'])[:80]} came")


def _replace(path: Path, data: bytes) -> None:
    """Write beside, then rename: whoever reads meanwhile has the old file or the new."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(data)
    beside.replace(path)
