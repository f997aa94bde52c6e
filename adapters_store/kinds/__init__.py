"""How methods parameterise adapters. One file per kind; adding one is a file here and a test file, nothing else."""

import importlib
import pkgutil

from adapters_store.errors import UnsupportedError
from adapters_store.kinds.base import Kind, KindConfig, Parameters

KINDS: dict[str, Kind] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}").KIND
    for module in pkgutil.iter_modules(__path__)
    if module.name != "base"
}


def kind(name: str) -> Kind:
    """The kind of this name. Raises UnsupportedError."""
    if name not in KINDS:
        raise UnsupportedError(f"unknown kind {name!r}; this version has {sorted(KINDS)}")
    return KINDS[name]


__all__ = ["KINDS", "Kind", "KindConfig", "Parameters", "kind"]
