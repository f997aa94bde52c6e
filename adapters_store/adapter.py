"""An adapter in memory, and its way to and from a manifest with one blob of tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters_store.errors import AllZeroError, KeysError, NoSiteError, NotFiniteError, RankError
from adapters_store.manifest import HeadSpec, SiteEntry, TensorSpec
from adapters_store.primitives import Entry
from adapters_store.primitives import head as head_primitive
from adapters_store.primitives.head import Head
from adapters_store.sites import Sites

_HEAD_PREFIX = "head."


@dataclass(frozen=True, eq=False)
class Adapter:
    """Entries at sites and, for a task that classifies, a head."""

    entries: Sequence[Entry]
    head: Head | None = None

    @property
    def max_rank(self) -> int:
        """Largest rank of its low-rank and bottleneck entries."""
        return max((_rank(entry) for entry in self.entries), default=0)


def _rank(entry: Entry) -> int:
    name = {"lowrank": "A", "bottleneck": "down"}.get(entry.primitive)
    return int(entry.tensors[name].shape[0]) if name and name in entry.tensors else 0


@dataclass(frozen=True)
class Packed:
    """What a manifest says of an adapter's contents, and the tensors of its blob."""

    sites: tuple[SiteEntry, ...]
    head: HeadSpec | None
    specs: dict[str, TensorSpec]
    tensors: dict[str, Tensor]


def pack(adapter: Adapter) -> Packed:
    """The adapter as manifest parts and blob tensors, contiguous on the CPU."""
    tensors: dict[str, Tensor] = {}
    sites = []
    for index, entry in enumerate(adapter.entries):
        names = {name: f"{entry.site}.{entry.primitive}.{index}.{name}" for name in entry.tensors}
        tensors |= {names[name]: tensor for name, tensor in entry.tensors.items()}
        sites.append(SiteEntry(site=entry.site, primitive=entry.primitive, tensors=names, options=dict(entry.options)))
    spec = None
    if adapter.head:
        names = {name: _HEAD_PREFIX + name for name in adapter.head.tensors}
        tensors |= {names[name]: tensor for name, tensor in adapter.head.tensors.items()}
        spec = adapter.head.spec.model_copy(update={"tensors": names})
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return Packed(tuple(sites), spec, {name: spec_of(tensor) for name, tensor in kept.items()}, kept)


def spec_of(tensor: Tensor) -> TensorSpec:
    """Shape and dtype as a manifest has them."""
    dtype: Any = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(shape=tuple(tensor.shape), dtype=dtype)


def unpack(sites: Sequence[SiteEntry], head: HeadSpec | None, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter of manifest parts and blob tensors. Raises KeysError if the two name different tensors."""
    named = [name for site in sites for name in site.tensors.values()]
    named += list(head.tensors.values()) if head else []
    if sorted(named) != sorted(tensors):
        missing, extra = sorted(set(named) - set(tensors)), sorted(set(tensors) - set(named))
        raise KeysError(f"manifest and tensors differ: missing {missing[:5]}, not named {extra[:5]}, or named twice")
    entries = [
        Entry(site.site, site.primitive, {name: tensors[key] for name, key in site.tensors.items()}, site.options)
        for site in sites
    ]
    loaded = Head(head, {name: tensors[key] for name, key in head.tensors.items()}) if head else None
    return Adapter(entries, loaded)


def check(adapter: Adapter, sites: Sites, *, max_rank: int, allow_zero: bool = False) -> None:
    """Refuse an adapter that this backbone cannot serve as promised. Raises a RefusedError that says why."""
    if not adapter.entries and adapter.head is None:
        raise NoSiteError("the adapter touches no site and has no head: it would change nothing")
    sites.check(adapter.entries)
    if adapter.max_rank > max_rank:
        raise RankError(f"rank {adapter.max_rank} is over the limit of {max_rank} (--max-rank)")
    tensors = [(entry.site, t) for entry in adapter.entries for t in entry.tensors.values()]
    for where, tensor in tensors + [("head", t) for t in (adapter.head.tensors.values() if adapter.head else ())]:
        if not torch.isfinite(tensor).all():
            raise NotFiniteError(f"a tensor at {where} has NaN or infinity")
    for entry in adapter.entries:
        for name, value in entry.options.items():
            if name == "scale" and not abs(float(value)) <= 1e6:
                raise NotFiniteError(f"scale {value} at {entry.site} is not a usable number (limit 1e6)")
    if adapter.entries and not allow_zero and not any(_acts(entry, sites) for entry in adapter.entries):
        raise AllZeroError(
            "the adapter is zero everywhere and would answer as the bare backbone; allow_zero permits it"
        )
    if adapter.head:
        head_primitive.check(adapter.head, sites.hidden_size)


def _acts(entry: Entry, sites: Sites) -> bool:
    """True unless the entry's delta is zero for every input."""
    tensors = entry.tensors
    if entry.options.get("scale") == 0:
        return False
    if entry.primitive == "lowrank":
        return bool(tensors["A"].any() and tensors["B"].any())
    if entry.primitive == "bottleneck":
        return bool(tensors["up"].any() or ("up_bias" in tensors and tensors["up_bias"].any()))
    if entry.primitive == "scale_shift":
        scale, shift = tensors.get("scale"), tensors.get("shift")
        return bool((scale is not None and (scale != 1).any()) or (shift is not None and shift.any()))
    own = sites[entry.site].place.module
    return any(not torch.equal(t.float(), getattr(own, name).float().cpu()) for name, t in tensors.items())
