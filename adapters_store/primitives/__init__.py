"""What the server executes. One file per primitive: its reference, its check, its batched form."""

from adapters_store.errors import UnsupportedError
from adapters_store.primitives import bottleneck, lowrank, norm, scale_shift
from adapters_store.primitives.base import Bank, Entry, Place, Primitive

PRIMITIVES: dict[str, Primitive] = {
    module.PRIMITIVE.name: module.PRIMITIVE for module in (lowrank, scale_shift, norm, bottleneck)
}


def primitive(name: str) -> Primitive:
    """The primitive of this name. Raises UnsupportedError."""
    if name not in PRIMITIVES:
        raise UnsupportedError(f"unknown primitive {name!r}; this version runs {sorted(PRIMITIVES)}")
    return PRIMITIVES[name]


__all__ = ["PRIMITIVES", "Bank", "Entry", "Place", "Primitive", "primitive"]
