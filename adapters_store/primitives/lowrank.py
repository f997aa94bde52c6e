"""lowrank: delta = scale * B (A x).

Tensors: A (r, d_in), B (d_out, r). Option: scale. Source: LoRA, Hu et al. 2021 (arXiv 2106.09685). Every method whose
delta factors (rank concatenation, truncation, three-factor products) is served by it.

Batched three ways: a kernel (no gradients; native on a CPU, Triton on a GPU), and the dense and folded torch forms of
two_layer.py; cost.py chooses per batch, on a GPU the kernel serves wherever it can.
"""

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters_store.mixing import Mix, MixedBatch
from adapters_store.primitives import cost, differentiable, native, two_layer
from adapters_store.primitives.base import (
    Bank,
    Entry,
    Place,
    Primitive,
    add_at,
    check_names,
    check_shape,
    pick,
    rank_of,
    wide,
)
from adapters_store.primitives.native import NativePair
from adapters_store.primitives.two_layer import Pair


def check(place: Place, entry: Entry) -> None:
    """Raises KeysError, ShapeError or NotFiniteError if the entry does not fit the place."""
    check_names(entry, {"A", "B"}, set(), {"scale"})
    rank = rank_of(entry, "A")
    check_shape(entry, "A", (rank, place.d_in))
    check_shape(entry, "B", (place.d_out, rank))
    two_layer.check_fits(place, entry, ["B"])


def delta(place: Place, entry: Entry, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001  # one signature for all
    """Give scale * B (A x). x: (tokens, d_in); returns (tokens, d_out) float32."""
    A, B = wide(entry.tensors["A"]), wide(entry.tensors["B"])
    return float(entry.options.get("scale", 1.0)) * (wide(x) @ A.mT @ B.mT)


@dataclass(frozen=True)
class _Slot:
    """An adapter as what serves it wants it.

    kept: in a kernel's layout, NativePair or GroupedPair; None: for torch forms only. given: for torch forms; None:
    made of what is kept, if they ever serve it.
    """

    rank: int
    kept: Any
    given: Pair | None

    @functools.cached_property
    def pair(self) -> Pair:
        """For torch forms."""
        made: Pair = self.given or self.kept.for_torch()
        return made


class LowRankBank(Bank):
    """Adapters in the kernel's layout where it serves, else as (A, scaled B) in the backbone's dtype."""

    slots: dict[int, _Slot]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = native.Table()
        self._torch_only: set[int] = set()  # slots that are not in the kernel's layout
        self._triton = _triton_kernels(self.dtype, self.device)
        self._grouped = self._triton.Table(self.device) if self._triton else None
        self._has_native = native.supports(self.dtype, self.device)

    @property
    def grouped(self) -> Any:
        """The table of addresses that launches on a GPU read; None where another form serves."""
        return None if self._torch_only or cost.is_forced() else self._grouped

    @property
    def native(self) -> native.Table | None:
        """The table of addresses that the CPU's kernel reads; None where another form serves."""
        return None if self._torch_only or cost.is_forced() or not self._has_native else self._table

    def prepare(self, entry: Entry) -> _Slot:
        """Scale folded into B in float32; then the layout that serves."""
        A, B = entry.tensors["A"], wide(entry.tensors["B"]) * float(entry.options.get("scale", 1.0))
        if B.requires_grad or A.requires_grad:
            return _Slot(len(A), None, Pair(A, B))
        if self._triton:
            grouped = self._triton.GroupedPair.of(wide(A), B, self.dtype, self.device)
            return _Slot(len(A), grouped, grouped.pair)
        if self._has_native and A.shape[0] <= native.MAX_RANK:
            return _Slot(len(A), NativePair.of(A.float(), B, paired=native.is_paired(self.dtype)), None)
        return _Slot(len(A), None, Pair(A.to(self.device, self.dtype), B.to(self.device, self.dtype)))

    def changed(self, slot: int) -> None:
        """Keep the kernel's table in step."""
        kept = self.slots.get(slot)
        self._table.fill(slot, kept.rank if kept else 0, None if self._triton or not kept else kept.kept)
        if self._grouped is not None:
            self._grouped.fill(slot, kept.kept if kept else None)
        if kept and not kept.kept:
            self._torch_only.add(slot)
        else:
            self._torch_only.discard(slot)

    def add(self, out: Tensor, x: Tensor, y: Tensor, batch: MixedBatch) -> Tensor:
        """See Bank.add."""
        self._table.reach(batch.max_slot)
        ranks = self._table.ranks[batch.slots]
        has_kernel = self._has_kernel(out, x, batch)
        path = "native"
        if not (self._triton and has_kernel) or cost.is_forced():
            path = cost.cheapest(batch, ranks, x.shape[1], out.shape[1], x.dtype, has_kernel)
        if path == "native" and self._triton:
            self._triton.add(out, x, self._grouped, batch, self.place.layer)
            return out
        if path == "native":
            native.add(out, x, self._table, batch, self.place.layer)
            return out
        slots = self.chosen(batch)
        selection, pairs = batch.select(slots), [self.slots[slot].pair for slot in slots]
        if torch.is_grad_enabled() and x.dtype == out.dtype and x.device.type == "cpu" and not cost.is_forced():
            weights = selection.weights(self.place.layer)
            return differentiable.by_mix(out, x, pairs, two_layer.acting(weights, selection), weights, selection)
        form = two_layer.dense if path == "dense" else two_layer.fold
        return add_at(out, selection.tokens, form(pick(x, selection.tokens), pairs, selection, self.place.layer, None))

    def _has_kernel(self, out: Tensor, x: Tensor, batch: MixedBatch) -> bool:
        """True if a kernel can serve this batch: its dtype and layout, and no gradients wanted."""
        return (
            (self._has_native or self._triton is not None)
            and x.dtype == out.dtype == self.dtype
            and (not self._torch_only or self._torch_only.isdisjoint(batch.active))
            and not (torch.is_grad_enabled() and (x.requires_grad or out.requires_grad or batch.is_learned))
            and x.stride(1) == 1 == out.stride(1)
        )


@functools.cache
def _triton_kernels(dtype: torch.dtype, device: torch.device) -> Any:
    """The module of kernels for a GPU where they can serve, else None. Triton takes long to import, so not before."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from adapters_store.primitives import triton_lowrank
    except ImportError:  # torch for CUDA brings triton on Linux only
        return None
    serves = triton_lowrank.supports(dtype, device) and _agrees(triton_lowrank, dtype, device)
    return triton_lowrank if serves else None


def _agrees(kernels: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """A small case against torch: what this GPU makes of the kernels must be right before they serve."""
    generator = torch.Generator().manual_seed(0)
    A, B, x, out = (torch.randn(*shape, generator=generator) for shape in ((3, 32), (48, 3), (6, 32), (6, 48)))
    x, out = x.to(device, dtype), out.to(device, dtype)
    batch = MixedBatch.of([(5, Mix.one_hot(0, 1)), (1, None)], 1, device)
    expected = out.float()
    expected[:5] += x[:5].float() @ A.mT.to(device) @ B.mT.to(device)
    try:
        table = kernels.Table(device)
        table.fill(0, pair := kernels.GroupedPair.of(A, B, dtype, device))
        kernels.add(out, x, table, batch, 0)
    except Exception:  # noqa: BLE001  # no compiler, another driver: the torch forms serve
        return False
    return pair is not None and torch.allclose(out.float(), expected, atol=1e-2 if dtype == torch.float32 else 0.5)


PRIMITIVE = Primitive("lowrank", check, delta, LowRankBank)
