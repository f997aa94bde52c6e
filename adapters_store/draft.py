"""A manifest before it has its number: an adapter's contents and the facts about it."""

from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from adapters_store.adapter import Adapter, Packed, pack
from adapters_store.errors import FormatError, InvalidError
from adapters_store.manifest import Manifest, canonical_json, digest_of
from adapters_store.tensors import write_tensors


def to_bytes(adapter: Adapter) -> tuple[Packed, bytes]:
    """What a manifest says of the adapter's contents, and its blob. Raises FormatError or TooLargeError."""
    try:
        packed = pack(adapter)
    except ValidationError as error:
        came = error.errors()[0]["input"]
        raise FormatError(f"tensors must be float32, float16 or bfloat16, {came!r} came; convert them") from error
    return packed, write_tensors(packed.tensors)


def draft(packed: Packed, data: bytes, facts: dict[str, Any]) -> Manifest:
    """The manifest with the number 1. Raises InvalidError for facts that JSON cannot hold."""
    try:
        canonical_json([facts[name] for name in ("hyperparameters", "metrics", "provenance")])
        return Manifest(
            **facts, sites=packed.sites, tensors=packed.specs, head=packed.head, blob=digest_of(data),
            version=1, size_bytes=len(data), created_at=datetime.now(UTC),
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise InvalidError(
            f"the manifest would not be plain JSON: {error}; give numbers, texts, lists, maps"
        ) from error
