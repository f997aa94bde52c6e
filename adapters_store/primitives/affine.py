"""Shared by scale_shift and norm: deltas of the form gain * source + shift, linear in the adapter.

Because gain and shift enter linearly, mixing outputs is mixing gains: sum_k w_k (gain_k * s + shift_k) =
(sum_k w_k gain_k) * s + sum_k w_k shift_k, exactly. So a batch costs one small product per mix and one multiply-add.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from adapters_store.mixing import MixedBatch
from adapters_store.primitives.base import Bank, add_at, pick


class AffineBank(Bank):
    """Slots hold (gain, shift), float32, (d,) each; zeros where an adapter leaves one out."""

    slots: dict[int, tuple[Tensor, Tensor]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stacked: dict[tuple[int, ...], Tensor] = {}

    def changed(self, slot: int) -> None:
        """Forget tables that held the slot."""
        self._stacked = {slots: table for slots, table in self._stacked.items() if slot not in slots}

    @abstractmethod
    def source(self, x: Tensor, y: Tensor) -> Tensor:
        """(tokens, d) float32: what the gain multiplies."""

    def add(self, out: Tensor, x: Tensor, y: Tensor, batch: MixedBatch) -> Tensor:
        """See Bank.add."""
        slots = self.chosen(batch)
        selection = batch.select(slots)
        if not len(selection.mixes):
            return out
        table = self._table(slots)
        weights = selection.weights(self.place.layer).to(table.dtype)  # (m, slots)
        gain, shift = (weights @ table).chunk(2, dim=-1)  # (m, d) each
        tokens = selection.tokens
        source = self.source(pick(x, tokens), pick(y, tokens))
        if len(selection.mixes) > 1:
            gain, shift = gain[selection.local_mix], shift[selection.local_mix]  # (n, d)
        return add_at(out, tokens, source * gain + shift)

    def _table(self, slots: tuple[int, ...]) -> Tensor:
        """(slots, 2 d) Gains beside shifts."""
        if slots in self._stacked:
            return self._stacked[slots]
        table = torch.stack([torch.cat(self.slots[slot]) for slot in slots])
        if not any(part.requires_grad for slot in slots for part in self.slots[slot]):  # else stale after a step
            self._stacked = {slots: table}  # the last one only: batches in a row tend to use the same adapters
        return table
