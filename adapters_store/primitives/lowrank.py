"""lowrank: delta = scale * B (A x).

Tensors: A (r, d_in), B (d_out, r). Option: scale. Source: LoRA, Hu et al. 2021 (arXiv 2106.09685). Every method whose
delta factors (rank concatenation, truncation, three-factor products) is served by it.

Batched three ways: the native kernel (CPU, no gradients), and the dense and folded torch forms of two_layer.py;
cost.py chooses per batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters_store.mixing import MixedBatch
from adapters_store.primitives import cost, native, two_layer
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
    """Raises KeysError or ShapeError if the entry does not fit the place."""
    check_names(entry, {"A", "B"}, set(), {"scale"})
    rank = rank_of(entry, "A")
    check_shape(entry, "A", (rank, place.d_in))
    check_shape(entry, "B", (place.d_out, rank))


def delta(place: Place, entry: Entry, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001  # one signature for all
    """Give scale * B (A x). x: (tokens, d_in); returns (tokens, d_out) float32."""
    A, B = wide(entry.tensors["A"]), wide(entry.tensors["B"])
    return float(entry.options.get("scale", 1.0)) * (wide(x) @ A.mT @ B.mT)


@dataclass(frozen=True)
class _Slot:
    pair: Pair
    native: NativePair | None


class LowRankBank(Bank):
    """Adapters in the kernel's layout where it serves, else as (A, scaled B) in the backbone's dtype."""

    slots: dict[int, _Slot]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = native.Table()
        self._torch_only: set[int] = set()  # slots that are not in the kernel's layout
        self._has_native = native.supports(self.dtype, self.device)

    def prepare(self, entry: Entry) -> _Slot:
        """Scale folded into B in float32; then the layout that serves."""
        A, B = entry.tensors["A"], wide(entry.tensors["B"]) * float(entry.options.get("scale", 1.0))
        if B.requires_grad or A.requires_grad:
            return _Slot(Pair(A, B), None)
        if self._has_native and A.shape[0] <= native.MAX_RANK:
            kept = NativePair.of(A.float(), B, paired=native.is_paired(self.dtype))
            return _Slot(kept.unpaired() or Pair(A.to(self.dtype), B.to(self.dtype)), kept)
        return _Slot(Pair(A.to(self.device, self.dtype), B.to(self.device, self.dtype)), None)

    def changed(self, slot: int) -> None:
        """Keep the kernel's table in step."""
        kept = self.slots.get(slot)
        self._table.fill(slot, kept.pair.rank if kept else 0, kept.native if kept else None)
        if kept and not kept.native:
            self._torch_only.add(slot)
        else:
            self._torch_only.discard(slot)

    def add(self, out: Tensor, x: Tensor, y: Tensor, batch: MixedBatch) -> Tensor:
        """See Bank.add."""
        self._table.reach(batch.max_slot)
        ranks = self._table.ranks[batch.slots]
        path = cost.cheapest(batch, ranks, x.shape[1], out.shape[1], x.dtype, self._can_native(out, x, batch))
        if path == "native":
            native.add(out, x, self._table, batch, self.place.layer)
            return out
        form = two_layer.dense if path == "dense" else two_layer.fold
        slots = self.chosen(batch)
        selection, pairs = batch.select(slots), [self.slots[slot].pair for slot in slots]
        return add_at(out, selection.tokens, form(pick(x, selection.tokens), pairs, selection, self.place.layer, None))

    def _can_native(self, out: Tensor, x: Tensor, batch: MixedBatch) -> bool:
        """True if the kernel can serve this batch: its dtype and layout, and no gradients wanted."""
        return (
            self._has_native
            and x.dtype == out.dtype == self.dtype
            and (not self._torch_only or self._torch_only.isdisjoint(batch.active))
            and not (torch.is_grad_enabled() and (x.requires_grad or out.requires_grad or batch.is_learned))
            and x.stride(1) == 1 == out.stride(1)
        )


PRIMITIVE = Primitive("lowrank", check, delta, LowRankBank)
