"""Low-rank deltas of a mixed batch with gradients, as one autograd node per site: two_layer.fold without its gathers.

out + sum_k w_k B_k A_k x, with gradients for out, x, A, B and w, for rows that use few of the batch's adapters. `fold`
gathers tokens by mix, whose gradient is a slow scatter; rows are contiguous, so each row is multiplied with its own
factors where it lies, rows of equal length together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from adapters_store.mixing import Selection
from adapters_store.packing import runs_of
from adapters_store.primitives.two_layer import Pair

_MUCH = 3  # products per row are less efficient than one product: they pay from this many times fewer ranks on


def pays(pairs: Sequence[Pair], chosen: Sequence[Sequence[int]]) -> bool:
    """True where rows use few of these adapters' ranks. chosen: for each mix the places of its adapters in pairs."""
    own = max(sum(pairs[i].rank for i in row) for row in chosen)
    return own * _MUCH <= sum(pair.rank for pair in pairs)


def by_row(
    out: Tensor, x: Tensor, pairs: Sequence[Pair], chosen: Sequence[Sequence[int]], weights: Tensor,
    selection: Selection,
) -> Tensor:  # fmt: skip
    """Give out + the delta; every token of the batch is in the selection. out: (n, d_out); x: (n, d_in).

    chosen: (m,) for each mix the places of its adapters in pairs; weights: (m, slots) float32.
    """
    A = [torch.cat([pairs[i].A for i in row]) for row in chosen]
    B = [torch.cat([pairs[i].B.mT * weights[m, i] for i in row]) for m, row in enumerate(chosen)]
    stacked = (pad_sequence(parts, batch_first=True).to(x.dtype) for parts in (A, B))  # (m, R, d_in), (m, R, d_out)
    runs = runs_of(selection.batch.lengths)
    found: Tensor = _ByRow.apply(out, x, *stacked, selection.local_mix_of_row, runs)  # type: ignore[no-untyped-call]
    return found


def _sums(values: Tensor, mix: Tensor, count: int) -> Tensor:
    """(count, R) sums of (n, R) values by mix; a product, because adding row by row takes longer."""
    return torch.nn.functional.one_hot(mix, count).to(values.dtype).mT @ values


class _ByRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, A: Tensor, B: Tensor, mix: Tensor, runs: Any) -> Tensor:
        hidden, delta = x.new_empty(len(x), A.shape[1]), torch.empty_like(out)
        for tokens, rows in _places(runs):
            at, own = mix[rows], (len(mix[rows]), -1)
            part = torch.bmm(x[tokens].reshape(*own, x.shape[1]), A[at].mT)
            hidden[tokens] = part.flatten(0, 1)
            delta[tokens] = torch.baddbmm(out[tokens].reshape(*own, out.shape[1]), part, B[at]).flatten(0, 1)
        ctx.save_for_backward(x, A, B, mix, hidden)
        ctx.runs = runs
        return delta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, mix, hidden = ctx.saved_tensors
        grad, wants_x = grad.contiguous(), ctx.needs_input_grad[1]
        grad_x = torch.empty_like(x) if wants_x else None
        of_A, of_B = A.new_empty(len(mix), *A.shape[1:]), B.new_empty(len(mix), *B.shape[1:])  # of each row
        for tokens, rows in _places(ctx.runs):
            at, own = mix[rows], (len(mix[rows]), -1)
            g, inner = grad[tokens].view(*own, grad.shape[1]), hidden[tokens].view(*own, hidden.shape[1])
            of_B[rows] = torch.bmm(inner.mT, g)
            inner = torch.bmm(g, B[at].mT)
            of_A[rows] = torch.bmm(inner.mT, x[tokens].reshape(*own, x.shape[1]))
            if grad_x is not None:
                grad_x[tokens] = torch.bmm(inner, A[at]).flatten(0, 1)
        grad_A, grad_B = (_sums(of.flatten(1), mix, len(A)).view(-1, *of.shape[1:]) for of in (of_A, of_B))
        return grad, grad_x, grad_A, grad_B, None, None


def _places(runs: Sequence[tuple[int, int, int]]) -> list[tuple[slice, slice]]:
    """Of each run of rows of one length, its tokens and its rows."""
    found, row = [], 0
    for start, rows, length in runs:
        found.append((slice(start, start + rows * length), slice(row, row + rows)))
        row += rows
    return found
