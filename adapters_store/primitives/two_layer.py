"""Shared by lowrank and bottleneck: deltas B f(A s + a) with weights mixed in behind f, as batched torch.

Two forms, both exact for any ranks, because ranks concatenate even through an elementwise f:
- dense: all active adapters' A side by side, one wide product, a mask of weights, one wide product back. Cost follows
  tokens x (ranks active in the batch): best for few adapters.
- fold: one (A, B) per mix, weights folded into B, tokens grouped by mix, two batched products. Cost follows
  tokens x (ranks of their own mix): best for many.
Both differentiate; training runs through them. `cost.py` says which is cheaper for a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from adapters_store.mixing import Selection
from adapters_store.primitives.base import wide

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """One adapter at one site. A: (r, d_in), a: (r,) or None, B: (d_out, r) with the scale in it, b: (d_out,)."""

    A: Tensor
    B: Tensor
    a: Tensor | None = None
    b: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank r."""
        return self.A.shape[0]


def dense(x: Tensor, pairs: Sequence[Pair], selection: Selection, layer: int, f: Activation | None) -> Tensor:
    """The delta of the selected tokens. x: (n, d_in), only those tokens; returns (n, d_out) in x's dtype."""
    ranks = torch.tensor([pair.rank for pair in pairs], device=x.device)
    weights = selection.weights(layer)  # (m, slots) float32
    A = torch.cat([pair.A for pair in pairs]).to(x.dtype)  # (R, d_in)
    B = torch.cat([pair.B for pair in pairs], dim=1).to(x.dtype)  # (d_out, R)
    hidden = _activate(x @ A.mT, _cat_bias(pairs), f)  # (n, R)
    mask = weights.repeat_interleave(ranks, dim=1).to(x.dtype)  # (m, R)
    delta = (hidden * _by_token(mask, selection)) @ B.mT  # (n, d_out)
    return _add_bias(delta, pairs, weights, selection)


def fold(x: Tensor, pairs: Sequence[Pair], selection: Selection, layer: int, f: Activation | None) -> Tensor:
    """The same as dense, by one folded pair per mix."""
    weights = selection.weights(layer)
    used = acting(weights, selection)
    A = _stack([torch.cat([pairs[i].A for i in row]) for row in used]).to(x.dtype)  # (m, R, d_in)
    scaled = [torch.cat([pairs[i].B.mT * weights[m, i] for i in row]) for m, row in enumerate(used)]
    B = _stack(scaled).to(x.dtype)  # (m, R, d_out)
    a = _cat_bias(pairs)
    bias = None if a is None else _stack([_pieces(a, pairs, row) for row in used])[:, None]  # (m, 1, R)
    if len(used) == 1:
        delta = _activate(x @ A[0].mT, None if bias is None else bias[0], f) @ B[0]
    else:
        index, place = selection.groups
        hidden = _activate(torch.bmm(x[index], A.mT), bias, f)  # (m, longest, R)
        delta = torch.bmm(hidden, B).flatten(0, 1)[place]  # (n, d_out)
    return _add_bias(delta, pairs, weights, selection)


def acting(weights: Tensor, selection: Selection) -> list[list[int]]:
    """For each mix the adapters to fold: those with any weight at this layer, at least one to keep shapes regular.

    If the weights are learned, all of its own: gradients flow into zeros too.
    """
    if weights.requires_grad:
        return selection.members
    return [row.nonzero().flatten().tolist() or [0] for row in weights.cpu()]


def _stack(pieces: list[Tensor]) -> Tensor:
    """Pieces of different lengths as one tensor, padded with zeros."""
    stacked: Tensor = pad_sequence(pieces, batch_first=True)
    return stacked


def _pieces(bias: Tensor, pairs: Sequence[Pair], row: Sequence[int]) -> Tensor:
    """The parts of all adapters' concatenated bias that belong to these."""
    parts = torch.split(bias, [pair.rank for pair in pairs])
    return torch.cat([parts[i] for i in row])


def _activate(hidden: Tensor, bias: Tensor | None, f: Activation | None) -> Tensor:
    if bias is not None:
        hidden = hidden + bias.to(hidden.dtype)
    return hidden if f is None else f(hidden)


def _cat_bias(pairs: Sequence[Pair]) -> Tensor | None:
    if all(pair.a is None for pair in pairs):
        return None
    return torch.cat([pair.A.new_zeros(pair.rank) if pair.a is None else pair.a for pair in pairs])


def _add_bias(delta: Tensor, pairs: Sequence[Pair], weights: Tensor, selection: Selection) -> Tensor:
    if all(pair.b is None for pair in pairs):
        return delta
    bias = torch.stack([delta.new_zeros(delta.shape[-1]) if pair.b is None else pair.b for pair in pairs])
    return delta + _by_token((weights.to(wide(bias).dtype) @ wide(bias)).to(delta.dtype), selection)


def _by_token(table: Tensor, selection: Selection) -> Tensor:
    """(n, …) or, for a single mix, (1, …): the row of each token's mix."""
    return table if len(selection.mixes) == 1 else table[selection.local_mix]
