"""One batch and who gets what in it: rows, their compositions, and the tables that every site reads.

A **row** is one request's tokens, contiguous in the flattened batch. A **mix** is a composition made ready to run:
slots of resident adapters and a weight for each of them at each layer. Rows point at mixes, so ten requests with one
composition cost one. Everything here is built once per batch and shared by all sites.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TILE = 16  # tokens of a tile at most; what the kernel for GPUs works on


@dataclass(frozen=True, eq=False)
class Mix:
    """Adapters by slot, and their weights per layer.

    slots: (k,) distinct. weights: (k, num_layers) float32: a numpy array to serve, a tensor to differentiate through.
    """

    slots: tuple[int, ...]
    weights: npt.NDArray[np.float32] | Tensor

    @staticmethod
    def one_hot(slot: int, num_layers: int) -> "Mix":
        """One adapter alone, at full weight everywhere."""
        return Mix((slot,), np.ones((1, num_layers), np.float32))

    @cached_property
    def key(self) -> tuple[tuple[int, ...], bytes | int]:
        """Equal for mixes that do the same; weights that are learned are compared by identity."""
        if isinstance(self.weights, Tensor):
            return self.slots, id(self.weights)
        return self.slots, np.asarray(self.weights, np.float32).tobytes()

    @cached_property
    def pruned(self) -> "Mix":
        """The same without adapters whose weight is zero at all layers, in the order of slots; learned weights stay.

        Adding zero times a delta could turn -0.0 into 0.0, and a zero-weight adapter would cost as much as any other.
        """
        if isinstance(self.weights, Tensor):
            return self
        acting: list[bool] = np.any(self.weights, axis=1).tolist()
        kept = sorted((slot, i) for i, slot in enumerate(self.slots) if acting[i])
        return Mix(tuple(slot for slot, _ in kept), np.asarray(self.weights)[[i for _, i in kept]])


def _enter(mix: Mix, index: dict[object, int], mixes: list[Mix]) -> int:
    """Where the mix stands among the distinct ones, entered if it is new; -1 if it does nothing."""
    pruned = mix.pruned
    if not pruned.slots:
        return -1
    if pruned.key not in index:
        index[pruned.key] = len(mixes)
        mixes.append(pruned)
    return index[pruned.key]


@dataclass(eq=False)
class MixedBatch:
    """Rows in the order of the flattened batch; a row's mix is an index into `mixes`, or -1 for the bare backbone."""

    lengths: Sequence[int]
    mix_of_row: Sequence[int]
    mixes: Sequence[Mix]
    num_layers: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def of(rows: Sequence[tuple[int, Mix | None]], num_layers: int, device: torch.device | str = "cpu") -> "MixedBatch":
        """The batch of rows given as (number of tokens, mix); mixes are pruned, equal ones merged, empty ones none."""
        found: dict[int, int] = {}  # by identity first: rows of one task share their Mix object
        index: dict[object, int] = {}
        mixes: list[Mix] = []
        for _, mix in rows:
            if mix is not None and id(mix) not in found:
                found[id(mix)] = _enter(mix, index, mixes)
        mix_of_row = [-1 if mix is None else found[id(mix)] for _, mix in rows]
        return MixedBatch([length for length, _ in rows], mix_of_row, mixes, num_layers, torch.device(device))

    def with_lengths(self, lengths: Sequence[int]) -> "MixedBatch":
        """The same rows with other numbers of tokens: one each for a pooler, the padded length for a padded batch."""
        return MixedBatch(lengths, self.mix_of_row, self.mixes, self.num_layers, self.device)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(self.lengths)

    @cached_property
    def row_start(self) -> list[int]:
        """(rows,) Index of each row's first token."""
        return [0, *np.cumsum(self.lengths).tolist()][:-1]

    @cached_property
    def mix_offset(self) -> npt.NDArray[np.int64]:
        """(mixes + 1,) Where the pairs of each mix begin."""
        return np.cumsum([0, *(len(mix.slots) for mix in self.mixes)], dtype=np.int64)

    @cached_property
    def pair_slot(self) -> npt.NDArray[np.int64]:
        """(pairs,) Slot of each (mix, adapter) pair."""
        return np.array([slot for mix in self.mixes for slot in mix.slots], np.int64)

    @cached_property
    def pair_mix(self) -> npt.NDArray[np.int64]:
        """(pairs,) Mix of each pair."""
        return np.repeat(np.arange(len(self.mixes)), np.diff(self.mix_offset))

    @cached_property
    def pair_position(self) -> npt.NDArray[np.int64]:
        """(pairs,) Where in `slots` the slot of each pair stands."""
        return np.searchsorted(self.slots, self.pair_slot)

    @cached_property
    def pair_weight(self) -> Tensor:
        """(num_layers, pairs) float32 on `device`, contiguous."""
        weights = [mix.weights for mix in self.mixes]
        if any(isinstance(each, Tensor) for each in weights):
            learned = torch.cat([torch.as_tensor(each, dtype=torch.float32) for each in weights])
            return learned.T.contiguous().to(self.device)
        fixed = np.concatenate(weights, dtype=np.float32)  # torch.cat takes 0.1 ms for 64 mixes: once per decoded token
        return torch.from_numpy(np.ascontiguousarray(fixed.T)).to(self.device)

    @cached_property
    def is_learned(self) -> bool:
        """True if gradients flow into the weights."""
        return self.pair_weight.requires_grad

    @cached_property
    def active(self) -> frozenset[int]:
        """Slots that some row uses."""
        return frozenset(slot for mix in self.mixes for slot in mix.slots)

    @cached_property
    def slots(self) -> npt.NDArray[np.int64]:
        """(active,) The same in order."""
        return np.array(sorted(self.active), np.int64)

    @cached_property
    def max_slot(self) -> int:
        """The largest of them; -1 if there are none."""
        return max(self.active, default=-1)

    @cached_property
    def tokens_of_mix(self) -> npt.NDArray[np.int64]:
        """(mixes,) Tokens that run under each mix."""
        counts = np.zeros(len(self.mixes) + 1, np.int64)
        np.add.at(counts, np.asarray(self.mix_of_row, np.int64), np.asarray(self.lengths, np.int64))  # -1: the last
        return counts[:-1]

    @cached_property
    def memo(self) -> dict[object, Any]:
        """What primitives worked out about this batch, under keys of their own."""
        return {}

    @cached_property
    def tiles(self) -> npt.NDArray[np.int64]:
        """(tiles, 3) Start, tokens and mix of runs of at most TILE tokens; rows without a mix have none."""
        tiles = [
            (start + at, min(TILE, length - at), mix)
            for start, length, mix in zip(self.row_start, self.lengths, self.mix_of_row, strict=True)
            if mix >= 0
            for at in range(0, length, TILE)
        ]
        return np.array(tiles, np.int64).reshape(-1, 3)

    @cached_property
    def mix_of_token(self) -> npt.NDArray[np.int64]:
        """(tokens,) Mix of each token, -1 for none."""
        return np.repeat(np.asarray(self.mix_of_row, np.int64), np.asarray(self.lengths, np.int64))

    @cached_property
    def _by_slots(self) -> dict[tuple[int, ...], "Selection"]:
        return {}

    def select(self, slots: tuple[int, ...]) -> "Selection":
        """The part of the batch that uses any of these slots."""
        if slots not in self._by_slots:
            self._by_slots[slots] = Selection(self, slots)
        return self._by_slots[slots]


class Selection:
    """The tokens of a batch that use any of some slots, and their weights; shared by all sites with these slots."""

    def __init__(self, batch: MixedBatch, slots: tuple[int, ...]) -> None:
        self.batch = batch
        self.slots = slots
        column = {slot: i for i, slot in enumerate(slots)}
        self._pairs = np.array([i for i, slot in enumerate(batch.pair_slot.tolist()) if slot in column], np.int64)
        self._columns = np.array([column[slot] for slot in batch.pair_slot[self._pairs].tolist()], np.int64)
        self._weights: dict[int, Tensor] = {}
        self.mixes: npt.NDArray[np.int64] = np.unique(batch.pair_mix[self._pairs])  # (m,) mixes with such a slot

    @cached_property
    def tokens(self) -> Tensor | None:
        """(n,) int64 Indices of the tokens; None if it is all of them."""
        chosen = np.isin(self.batch.mix_of_token, self.mixes)
        return None if chosen.all() else torch.from_numpy(np.flatnonzero(chosen)).to(self.batch.device)

    @cached_property
    def local_mix(self) -> Tensor:
        """(n,) int64 For each chosen token, the position of its mix in `mixes`."""
        mix_of_token = self.batch.mix_of_token
        chosen = mix_of_token[np.isin(mix_of_token, self.mixes)]
        return torch.from_numpy(np.searchsorted(self.mixes, chosen)).to(self.batch.device)

    @cached_property
    def local_mix_of_row(self) -> Tensor:
        """(rows,) int64 For each row, the position of its mix in `mixes`; only where `tokens` is None."""
        return torch.from_numpy(np.searchsorted(self.mixes, self.batch.mix_of_row)).to(self.batch.device)

    def weights(self, layer: int) -> Tensor:
        """(m, slots) float32: weight of each slot in each chosen mix at this layer."""
        if layer not in self._weights:
            rows = np.searchsorted(self.mixes, self.batch.pair_mix[self._pairs])
            flat = torch.from_numpy(rows * len(self.slots) + self._columns).to(self.batch.device)
            pairs = torch.from_numpy(self._pairs).to(self.batch.device)
            zeros = torch.zeros(len(self.mixes) * len(self.slots), device=self.batch.device)
            filled = zeros.index_add(0, flat, self.batch.pair_weight[layer].index_select(0, pairs))
            self._weights[layer] = filled.view(len(self.mixes), len(self.slots))
        return self._weights[layer]

    @cached_property
    def members(self) -> list[list[int]]:
        """(m,) For each chosen mix the positions in `slots` of its adapters."""
        of_pair = np.searchsorted(self.mixes, self.batch.pair_mix[self._pairs])
        return [self._columns[of_pair == mix].tolist() for mix in range(len(self.mixes))]

    @cached_property
    def groups(self) -> tuple[Tensor, Tensor]:
        """Chosen tokens grouped by mix, padded to the largest group.

        Returns index (m, longest) into the chosen tokens (padding repeats token 0), and place (n,): where in the
        flattened index each chosen token stands.
        """
        local = self.local_mix.cpu().numpy()
        order = np.argsort(local, kind="stable")
        counts = np.bincount(local, minlength=len(self.mixes))
        begin = np.concatenate([[0], np.cumsum(counts)[:-1]])
        within = np.arange(len(local)) - np.repeat(begin, counts)
        longest = int(counts.max())
        index = np.zeros((len(self.mixes), longest), np.int64)
        index[local[order], within] = order
        place = np.empty(len(local), np.int64)
        place[order] = local[order] * longest + within
        return torch.from_numpy(index).to(self.batch.device), torch.from_numpy(place).to(self.batch.device)
