"""A mixed batch as kernels for GPUs read it: tiles of tokens under one mix, and the adapters of each, on the device."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters_store.mixing import MixedBatch


@dataclass(frozen=True, eq=False)
class Grouping:
    """A batch as the kernels read it.

    tiles: (n, 4) int64 first token, tokens, first pair, pairs of each tile, zeros where idle. pair_slot: (pairs,)
    int64. weights: (num_layers, pairs) float32. max_pairs: the most pairs that a tile may have.
    """

    tiles: Tensor
    pair_slot: Tensor
    weights: Tensor
    max_pairs: int

    @staticmethod
    def of(batch: MixedBatch) -> "Grouping":
        """The batch's own, made once; a batch that stands for buffers brings one in its memo."""
        found: Grouping | None = batch.memo.get(Grouping)
        if found is None:
            tiles, device = grouped_tiles(batch), batch.device
            found = batch.memo[Grouping] = Grouping(
                torch.from_numpy(tiles).to(device),
                torch.from_numpy(batch.pair_slot).to(device),
                batch.pair_weight.detach(),
                int(tiles[:, 3].max(initial=0)),
            )
        return found


def grouped_tiles(batch: MixedBatch) -> npt.NDArray[np.int64]:
    """(tiles, 4) int64 First token, tokens, first pair and pairs of each tile."""
    starts, counts, mixes = batch.tiles.T
    return np.stack([starts, counts, batch.mix_offset[mixes], np.diff(batch.mix_offset)[mixes]], axis=1)
