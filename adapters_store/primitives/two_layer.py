"""Shared by lowrank and bottleneck: deltas B f(A s + a) with weights mixed in behind f, as batched torch.

Two forms, both exact for any ranks, because ranks concatenate even through an elementwise f:
- dense: all active adapters' A side by side, one wide product, a mask of weights, one wide product back. Cost follows
  tokens x (ranks active in the batch): best for few adapters.
- fold: one (A, B) per mix, weights folded into B, tokens grouped by mix, two batched products. Cost follows
  tokens x (ranks of their own mix): best for many.
Both differentiate; training runs through them. `cost.py` says which is cheaper for a batch.

A token sees its own mix's adapters alone, forwards and backwards, also where another adapter's numbers overflow on it:
what is not its own is taken out before f, because zero times infinity is NaN behind it and in f's derivative.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from adapters_store.errors import NotFiniteError
from adapters_store.mixing import Selection
from adapters_store.primitives.base import Entry, Place, wide

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


def check_fits(place: Place, entry: Entry, names: Sequence[str]) -> None:
    """Refuse a B or b that is infinite in the backbone's dtype with the scale in it. Raises NotFiniteError.

    In a product that other adapters' tokens share, its zero weight would make NaN of it.
    """
    scale, dtype = float(entry.options.get("scale", 1.0)), next(place.module.parameters()).dtype
    for name in names:
        if (wide(entry.tensors[name]) * scale).to(dtype).isinf().any():
            raise NotFiniteError(
                f"{entry.primitive}.{name} at {entry.site} times scale {scale} must fit {dtype}, and some numbers "
                "are larger; serve it in a wider dtype, or train it to smaller numbers"
            )


def dense(x: Tensor, pairs: Sequence[Pair], selection: Selection, layer: int, f: Activation | None) -> Tensor:
    """The delta of the selected tokens. x: (n, d_in), only those tokens; returns (n, d_out) in x's dtype."""
    weights, of_rank = selection.weights(layer), _slot_of_rank(pairs, selection)  # (m, slots) float32, (R,)
    A = torch.cat([pair.A for pair in pairs]).to(x.dtype)  # (R, d_in)
    B = torch.cat([pair.B for pair in pairs], dim=1).to(x.dtype)  # (d_out, R)
    idle = _idle(weights, selection)
    if idle is not None:
        idle = _by_token(idle.index_select(1, of_rank), selection)  # (n, R)
    hidden = _activate(x @ A.mT, _cat_bias(pairs), f, idle)  # (n, R)
    mask = weights.index_select(1, of_rank).to(x.dtype)  # (m, R)
    delta = (hidden * _by_token(mask, selection)) @ B.mT  # (n, d_out)
    return _add_bias(delta, pairs, weights, selection)


def _slot_of_rank(pairs: Sequence[Pair], selection: Selection) -> Tensor:
    """(R,) Which of the pairs each rank belongs to; made once per batch."""
    ranks = tuple(pair.rank for pair in pairs)
    found: Tensor | None = selection.batch.memo.get(("slot_of_rank", ranks))
    if found is None:
        found = torch.repeat_interleave(torch.tensor(ranks)).to(selection.batch.device)
        selection.batch.memo["slot_of_rank", ranks] = found
    return found


def fold(x: Tensor, pairs: Sequence[Pair], selection: Selection, layer: int, f: Activation | None) -> Tensor:
    """The same as dense, by one folded pair per mix."""
    weights = selection.weights(layer)
    used = acting(weights, selection)
    no_A, no_B = x.new_zeros(0, x.shape[1]), x.new_zeros(0, pairs[0].B.shape[0])  # of a mix that uses none
    A = _stack([torch.cat([no_A, *(pairs[i].A for i in row)]) for row in used]).to(x.dtype)  # (m, R, d_in)
    scaled = [torch.cat([no_B, *(pairs[i].B.mT * weights[m, i] for i in row)]) for m, row in enumerate(used)]
    B = _stack(scaled).to(x.dtype)  # (m, R, d_out)
    a = _cat_bias(pairs)
    bias = None if a is None else _stack([_pieces(a, pairs, row) for row in used])[:, None]  # (m, 1, R)
    if len(used) == 1:
        delta = _activate(x @ A[0].mT, None if bias is None else bias[0], f) @ B[0]
    else:
        index, place = selection.groups  # the padding stays zero: it must not be a token of another mix
        grouped = x.new_zeros(index.numel(), x.shape[1]).index_copy_(0, place, x).view(*index.shape, -1)
        hidden = _activate(torch.bmm(grouped, A.mT), bias, f)  # (m, longest, R)
        delta = torch.bmm(hidden, B).flatten(0, 1)[place]  # (n, d_out)
    return _add_bias(delta, pairs, weights, selection)


def acting(weights: Tensor, selection: Selection) -> list[list[int]]:
    """For each mix the adapters that it uses: those with any weight at this layer.

    If the weights are learned, all of its own: gradients flow into zeros too.
    """
    if weights.requires_grad:
        return selection.members
    return [row.nonzero().flatten().tolist() for row in weights.cpu()]


def _idle(weights: Tensor, selection: Selection) -> Tensor | None:
    """(m, slots) bool: what `acting` leaves out; None for nothing, where asking for that does not wait for a GPU."""
    if weights.requires_grad:
        idle = torch.ones(weights.shape, dtype=torch.bool)
        for own, members in zip(idle, selection.members, strict=True):
            own[members] = False
    else:
        idle = weights == 0
    return None if idle.device.type == "cpu" and not idle.any() else idle.to(weights.device)


def _stack(pieces: list[Tensor]) -> Tensor:
    """Pieces of different lengths as one tensor, padded with zeros."""
    stacked: Tensor = pad_sequence(pieces, batch_first=True)
    return stacked


def _pieces(bias: Tensor, pairs: Sequence[Pair], row: Sequence[int]) -> Tensor:
    """The parts of all adapters' concatenated bias that belong to these."""
    parts = torch.split(bias, [pair.rank for pair in pairs])
    return torch.cat([bias[:0], *(parts[i] for i in row)])


def _activate(hidden: Tensor, bias: Tensor | None, f: Activation | None, idle: Tensor | None = None) -> Tensor:
    """f(hidden + bias), with zeros for hidden + bias at idle places. hidden may be changed in place."""
    if bias is not None:
        hidden = hidden + bias.to(hidden.dtype)
    if idle is not None:
        hidden.masked_fill_(idle, 0)
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
    return table if len(selection.mixes) == 1 else table.index_select(0, selection.local_mix)
