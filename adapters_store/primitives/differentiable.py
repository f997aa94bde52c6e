"""Low-rank deltas of a mixed batch with gradients, as one autograd node per site.

out + sum_k w_k B_k A_k x, with gradients for out, x, A, B and w. Neighbouring rows whose mixes use the same adapters
share their products, and these use no other adapter's ranks; weights are multiplied in between, mix by mix, on views.
Plain torch (two_layer.py) gathers weights or tokens by mix, whose gradients are slow scatters. On a GPU, where many
small products are many launches, plain torch serves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adapters_store.mixing import Selection
from adapters_store.primitives.two_layer import Pair


@dataclass(frozen=True)
class Group:
    """Neighbouring tokens whose mixes use the same adapters.

    ranks: of these among all ranks, a slice where they lie together, else (R,) int64.
    spans: (start, stop, mix), counted within tokens.
    """

    tokens: slice
    ranks: slice | Tensor
    spans: Sequence[tuple[int, int, int]]


def by_mix(
    out: Tensor, x: Tensor, pairs: Sequence[Pair], chosen: Sequence[Sequence[int]], weights: Tensor,
    selection: Selection,
) -> Tensor:  # fmt: skip
    """Give out + the delta. out: (tokens, d_out); x: (tokens, d_in), of the whole batch, of one dtype.

    chosen: (m,) for each mix of the selection the places of its adapters in pairs; weights: (m, slots) float32.
    """
    A, B = torch.cat([pair.A for pair in pairs]), torch.cat([pair.B.mT for pair in pairs])  # (R, d_in), (R, d_out)
    ranks = torch.tensor([pair.rank for pair in pairs])
    found: Tensor = _ByMix.apply(  # type: ignore[no-untyped-call]
        out, x, A, B, weights.repeat_interleave(ranks, dim=1), _groups(selection, chosen, ranks)
    )
    return found


def _groups(selection: Selection, chosen: Sequence[Sequence[int]], ranks: Tensor) -> list[Group]:
    """The batch's tokens in order; rows without any of these adapters are in no group."""
    batch, of_mix = selection.batch, {mix: m for m, mix in enumerate(selection.mixes.tolist())}
    ends = [*batch.row_start, batch.num_tokens]
    rows = [
        (start, stop, of_mix.get(mix, -1)) for (start, stop), mix in zip(pairwise(ends), batch.mix_of_row, strict=True)
    ]
    found = []
    for used, part in groupby(rows, lambda row: tuple(chosen[row[2]]) if row[2] >= 0 else ()):
        if used:
            spans = list(part)
            start = spans[0][0]
            merged = [list(own) for _, own in groupby(spans, lambda span: span[2])]
            within = [(own[0][0] - start, own[-1][1] - start, own[0][2]) for own in merged]
            found.append(Group(slice(start, spans[-1][1]), _places(used, ranks), within))
    return found


def _places(used: Sequence[int], ranks: Tensor) -> slice | Tensor:
    """Where the ranks of these adapters lie among all."""
    ends = [0, *ranks.cumsum(0).tolist()]
    if list(used) == list(range(used[0], used[0] + len(used))):
        return slice(ends[used[0]], ends[used[-1] + 1])
    return torch.cat([torch.arange(ends[i], ends[i + 1]) for i in used])


class _ByMix(torch.autograd.Function):
    """A: (R, d_in) and B: (R, d_out) in the dtype they train in; weights: (m, R), a rank's weight in each mix."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, A: Tensor, B: Tensor, weights: Tensor, groups: Sequence[Group]
    ) -> Tensor:
        A, B, weights = (tensor.to(x.dtype) for tensor in (A, B, weights))
        found, hidden = out.clone(), []
        for group in groups:
            inner = x[group.tokens] @ A[group.ranks].mT
            hidden.append(inner)
            found[group.tokens].addmm_(_weighted(inner, weights, group), B[group.ranks])
        ctx.save_for_backward(x, A, B, weights, *hidden)
        ctx.groups = groups
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, weights, *hidden = ctx.saved_tensors
        grad, (_, wants_x, wants_A, wants_B, wants_weights, _) = grad.contiguous(), ctx.needs_input_grad
        grad_x = torch.zeros_like(x) if wants_x else None
        sums = _Sums(A, B, weights)
        for group, inner in zip(ctx.groups, hidden, strict=True):
            g, rows = grad[group.tokens], x[group.tokens]
            if wants_B:
                sums.add_B(group, _weighted(inner, weights, group).mT @ g)
            back = g @ B[group.ranks].mT
            if wants_weights:
                sums.add_weights(group, back * inner)
            back = _weighted(back, weights, group)
            if wants_A:
                sums.add_A(group, back.mT @ rows)
            if grad_x is not None:
                torch.mm(back, A[group.ranks], out=grad_x[group.tokens])
        return grad, grad_x, sums.A, sums.B, sums.weights if wants_weights else None, None


class _Sums:
    """Gradients of A, B and weights over groups, in float32 or better."""

    def __init__(self, A: Tensor, B: Tensor, weights: Tensor) -> None:
        dtype = torch.promote_types(A.dtype, torch.float32)
        self.A, self.B, self.weights = (torch.zeros_like(tensor, dtype=dtype) for tensor in (A, B, weights))

    def add_A(self, group: Group, part: Tensor) -> None:  # noqa: N802  # what the formulas call it
        _add(self.A, group, part)

    def add_B(self, group: Group, part: Tensor) -> None:  # noqa: N802
        _add(self.B, group, part)

    def add_weights(self, group: Group, products: Tensor) -> None:
        """products: (tokens, R) of gradient and hidden."""
        for start, stop, mix in group.spans:
            part = products[start:stop].sum(0, dtype=self.weights.dtype)
            _add(self.weights[mix], group, part)


def _add(sums: Tensor, group: Group, part: Tensor) -> None:
    if isinstance(group.ranks, slice):
        sums[group.ranks] += part
    else:
        sums.index_add_(0, group.ranks, part.to(sums.dtype))


def _weighted(hidden: Tensor, weights: Tensor, group: Group) -> Tensor:
    """(tokens, R) hidden times the weights of each token's mix."""
    found = torch.empty_like(hidden)
    for start, stop, mix in group.spans:
        torch.mul(hidden[start:stop], weights[mix][group.ranks], out=found[start:stop])
    return found
