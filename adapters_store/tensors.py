"""Tensors from bytes that a stranger sent, and back.

Only safetensors, and only the part of it that adapters need. The header is checked here before the bytes reach any
library: safetensors alone accepts 50 MB of metadata, 800 000 empty tensors, a tensor of 70 dimensions, one name twice,
and names like `../../x`. It then checks what is left: offsets without overlap or holes, sizes that follow from shapes.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from adapters_store.errors import FormatError, KeysError, ShapeError, TooLargeError
from adapters_store.manifest import TensorSpec

_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,256}\Z")
_DTYPES: dict[str, Literal["float32", "float16", "bfloat16"]] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_DIMS = 8
_WHAT_TO_DO = "send one .safetensors file, as safetensors.torch.save_file writes it"
_OTHER_FORMATS = {
    b"PK": "a zip archive, which is what torch.save writes (pickle)",
    b"\x80": "a Python pickle",
    b"\x1f\x8b": "a gzip archive",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a git-lfs pointer, not the file itself (git lfs pull fetches it)",
    b"<": "a web page or XML",
    b"{": "JSON",
}


@dataclass(frozen=True)
class TensorLimits:
    """How large a file of tensors may be, in bytes and in number."""

    max_bytes: int = 1 << 30
    max_header_bytes: int = 1 << 20
    max_metadata_bytes: int = 16 << 10
    max_tensors: int = 16384


LIMITS = TensorLimits()


def read_tensors(data: bytes, limits: TensorLimits = LIMITS) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises FormatError or TooLargeError; never runs anything."""
    read_specs(data, limits)
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise FormatError(f"broken safetensors file: {error}; write the file again") from error


def write_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as a safetensors file; equal contents give equal bytes. Raises what read_tensors would."""
    data = safetensors.torch.save({name: tensors[name].contiguous() for name in sorted(tensors)})
    read_specs(data, TensorLimits(max_bytes=len(data)))  # what cannot be read back is not written
    return data


def read_specs(data: bytes, limits: TensorLimits = LIMITS) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes in a safetensors file, all within the limits. Raises FormatError or TooLargeError."""
    header, size = _header(data, limits)
    _check_metadata(header.pop("__metadata__", {}), limits)
    if len(header) > limits.max_tensors:
        raise TooLargeError(f"{len(header)} tensors, the limit is {limits.max_tensors}; send fewer, larger tensors")
    specs = {name: _spec(name, entry) for name, entry in header.items()}
    promised = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if promised != size:
        problem = "is truncated" if promised > size else "has trailing bytes"
        raise FormatError(
            f"the file {problem}: its header promises {promised} bytes of tensors, {size} came; send it again"
        )
    return specs


def check_specs(expected: Mapping[str, TensorSpec], present: Mapping[str, TensorSpec]) -> None:
    """Refuse tensors that are not as a manifest says. Raises KeysError for names, ShapeError for shapes and dtypes."""
    if set(expected) != set(present):
        missing, extra = sorted(set(expected) - set(present)), sorted(set(present) - set(expected))
        raise KeysError(f"manifest and tensors differ: missing {missing[:5]}, not in the manifest {extra[:5]}")
    for name, spec in expected.items():
        if spec != present[name]:
            raise ShapeError(f"tensor {name} must be {_text(spec)} as its manifest says, it is {_text(present[name])}")


def _text(spec: TensorSpec) -> str:
    return f"{spec.dtype} {tuple(spec.shape)}"


def _header(data: bytes, limits: TensorLimits) -> tuple[dict[str, Any], int]:
    """The parsed header, and the number of bytes that follow it."""
    if len(data) > limits.max_bytes:
        raise TooLargeError(f"{len(data)} bytes of tensors, the limit is {limits.max_bytes}")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or 8 + length > len(data) or data[8:9] != b"{":
        raise FormatError(f"expected a safetensors file, {_what_came(data, length)}; {_WHAT_TO_DO}")
    if length > limits.max_header_bytes:
        raise TooLargeError(f"a header of {length} bytes, the limit is {limits.max_header_bytes}; send fewer tensors")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_without_doubles, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"the safetensors header is no JSON object that can be read: {error}; {_WHAT_TO_DO}"
        ) from error
    return header, len(data) - 8 - length


def _what_came(data: bytes, length: int) -> str:
    """What these bytes seem to be instead. A good file can begin with the same bytes: ask only of a bad one."""
    if not data:
        return "an empty file came"
    for magic, what in _OTHER_FORMATS.items():
        if data.startswith(magic):
            return f"this looks like {what}"
    return f"{len(data)} bytes came that start with a header length of {length}: truncated, or something else"


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0][:80]!r} is given twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _check_metadata(metadata: object, limits: TensorLimits) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("__metadata__ must map texts to texts")
    size = len(json.dumps(metadata))
    if size > limits.max_metadata_bytes:
        raise TooLargeError(f"{size} bytes of __metadata__, the limit is {limits.max_metadata_bytes}; leave it out")


def _spec(name: str, entry: object) -> TensorSpec:
    if not _NAME.match(name):
        raise FormatError(f"tensor name {name[:80]!r} is not allowed: use 1 to 256 of A-Z, a-z, 0-9, '_', '.', '-'")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"tensor {name} must have exactly dtype, shape and data_offsets; {_WHAT_TO_DO}")
    shape, dtype, offsets = entry["shape"], entry["dtype"], entry["data_offsets"]
    if not (isinstance(dtype, str) and dtype in _DTYPES):
        raise FormatError(f"tensor {name} has dtype {repr(dtype)[:40]}; convert it to one of {', '.join(_DTYPES)}")
    if not (_are_whole(shape, 1) and len(shape) <= _MAX_DIMS):
        raise FormatError(
            f"tensor {name} must have at most {_MAX_DIMS} dimensions, none empty; it has {repr(shape)[:80]}"
        )
    if not (_are_whole(offsets, 0) and len(offsets) == 2):
        raise FormatError(f"tensor {name} must have two data_offsets, it has {repr(offsets)[:80]}; {_WHAT_TO_DO}")
    return TensorSpec(shape=tuple(shape), dtype=_DTYPES[dtype])


def _are_whole(values: object, least: int) -> bool:
    """True for a list of whole numbers of at least so much."""
    return isinstance(values, list) and all(type(value) is int and value >= least for value in values)
