"""lowrank: delta = scale * B (A x).

Tensors: A (r, d_in), B (d_out, r). Option: scale. Source: LoRA, Hu et al. 2021 (arXiv 2106.09685). Every method whose
delta factors (rank concatenation, truncation, three-factor products) is served by it.

Batched three ways: the native kernel (CPU, no gradients), and the dense and folded torch forms of two_layer.py;
cost.py chooses per batch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters_store.mixing import MixedBatch
from adapters_store.primitives import cost, native, two_layer
from adapters_store.primitives.base import Bank, Entry, Place, Primitive, add_at, check_names, check_shape, pick
from adapters_store.primitives.native import NativePair
from adapters_store.primitives.two_layer import Pair


def check(place: Place, entry: Entry) -> None:
    """Raises KeysError or ShapeError if the entry does not fit the place."""
    check_names(entry, {"A", "B"}, set(), {"scale"})
    rank = entry.tensors["A"].shape[0]
    check_shape(entry, "A", (rank, place.d_in))
    check_shape(entry, "B", (place.d_out, rank))


def delta(place: Place, entry: Entry, x: Tensor, y: Tensor) -> Tensor:
    """scale * B (A x). x: (tokens, d_in); returns (tokens, d_out) float32."""
    A, B = entry.tensors["A"].float(), entry.tensors["B"].float()
    return float(entry.options.get("scale", 1.0)) * (x.float() @ A.mT @ B.mT)


@dataclass(frozen=True)
class _Slot:
    pair: Pair
    native: NativePair | None


class LowRankBank(Bank):
    """Adapters in the kernel's layout where it serves, else as (A, scaled B) in the backbone's dtype."""

    slots: dict[int, _Slot]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = np.zeros((0, 4), np.int64)  # rows of the C struct by slot
        self._uses_native = self.device.type == "cpu" and native.is_active()

    def prepare(self, entry: Entry) -> _Slot:
        """Scale folded into B in float32; then the layout that serves."""
        A, B = entry.tensors["A"], entry.tensors["B"].float() * float(entry.options.get("scale", 1.0))
        if B.requires_grad or A.requires_grad:
            return _Slot(Pair(A, B), None)
        if self._uses_native and A.shape[0] <= native.MAX_RANK:
            kept = NativePair.of(A.float(), B)
            return _Slot(Pair(kept.a[:, : A.shape[0]].mT, kept.b.mT), kept)  # views: one copy serves all forms
        return _Slot(Pair(A.to(self.device, self.dtype), B.to(self.device, self.dtype)), None)

    def changed(self, slot: int) -> None:
        """Keep the kernel's table in step."""
        if slot >= len(self._table):
            grown = np.zeros((max(16, 2 * slot + 2), 4), np.int64)
            grown[: len(self._table)] = self._table
            self._table = grown
        kept = self.slots.get(slot)
        self._table[slot] = kept.native.row if kept and kept.native else 0

    def add(self, out: Tensor, x: Tensor, y: Tensor, batch: MixedBatch) -> Tensor:
        """See Bank.add."""
        slots = self.chosen(batch)
        if not slots:
            return out
        selection = batch.select(slots)
        path = self._path(slots, x, out, batch)
        if path == "native":
            if slots[-1] >= len(self._table) or max(batch.active) >= len(self._table):
                self.changed(max(batch.active))
            native.add(out, x, self._table, batch, self.place.layer)
            return out
        form = two_layer.dense if path == "dense" else two_layer.fold
        pairs = [self.slots[slot].pair for slot in slots]
        return add_at(out, selection.tokens, form(pick(x, selection.tokens), pairs, selection, self.place.layer, None))

    def _path(self, slots: tuple[int, ...], x: Tensor, out: Tensor, batch: MixedBatch) -> str:
        """native, dense or fold: the cheapest that can serve this batch here."""
        chosen = [self.slots[slot] for slot in slots]
        can_native = (
            all(slot.native for slot in chosen)
            and native.supports(x, 0)
            and not (torch.is_grad_enabled() and (x.requires_grad or out.requires_grad))
            and x.stride(-1) == 1 and out.stride(-1) == 1
        )  # fmt: skip
        ranks = [slot.pair.rank for slot in chosen]
        return cost.cheapest(cost.work(batch, slots, ranks, *x.shape, out.shape[1]), x.dtype, can_native)


PRIMITIVE = Primitive("lowrank", check, delta, LowRankBank)
