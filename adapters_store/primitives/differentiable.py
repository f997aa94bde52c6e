"""Low-rank deltas of a mixed batch with gradients: the two forms of two_layer.py as one autograd node per site.

out + sum_k w_k B_k A_k x, with gradients for out, x, A, B and w. What plain torch records for the same is slow on two
counts: it gathers tokens by mix, whose gradient is a scatter, and keeps every product's operands and copies.

- `wide`: all adapters' A side by side, a mask of weights, all B side by side. For rows that use most adapters.
- `by_row`: each row's own factors, weights folded into B; rows are contiguous, so nothing is gathered. For rows that
  use few of the batch's adapters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from adapters_store.mixing import Selection
from adapters_store.packing import runs_of
from adapters_store.primitives.two_layer import Pair, acting

_MUCH = 3  # a product per row is less efficient than one product: it pays from this many times fewer ranks on


def add(out: Tensor, x: Tensor, pairs: Sequence[Pair], selection: Selection, layer: int) -> Tensor:
    """Give out + the delta; every token of the batch is in the selection. out: (n, d_out); x: (n, d_in)."""
    weights = selection.weights(layer)
    chosen = acting(weights, selection)
    own = max(sum(pairs[i].rank for i in row) for row in chosen)
    if own * _MUCH <= sum(pair.rank for pair in pairs):
        return by_row(out, x, pairs, chosen, weights, selection)
    return wide(out, x, pairs, weights, selection)


def wide(out: Tensor, x: Tensor, pairs: Sequence[Pair], weights: Tensor, selection: Selection) -> Tensor:
    """See add. weights: (m, slots) float32."""
    A = torch.cat([pair.A for pair in pairs]).to(x.dtype)  # (R, d_in)
    B = torch.cat([pair.B for pair in pairs], dim=1).to(x.dtype)  # (d_out, R)
    ranks = torch.tensor([pair.rank for pair in pairs], device=x.device)
    mask = weights.repeat_interleave(ranks, dim=1).to(x.dtype)  # (m, R)
    found: Tensor = _Wide.apply(out, x, A, B, mask, selection.local_mix)  # type: ignore[no-untyped-call]
    return found


def by_row(
    out: Tensor, x: Tensor, pairs: Sequence[Pair], chosen: Sequence[Sequence[int]], weights: Tensor,
    selection: Selection,
) -> Tensor:  # fmt: skip
    """See add. chosen: (m,) for each mix the places of its adapters in pairs."""
    A = [torch.cat([pairs[i].A for i in row]) for row in chosen]
    B = [torch.cat([pairs[i].B.mT * weights[m, i] for i in row]) for m, row in enumerate(chosen)]
    stacked = (pad_sequence(parts, batch_first=True).to(x.dtype) for parts in (A, B))  # (m, R, d_in), (m, R, d_out)
    runs = runs_of(selection.batch.lengths)
    found: Tensor = _ByRow.apply(out, x, *stacked, selection.local_mix_of_row, runs)  # type: ignore[no-untyped-call]
    return found


class _Wide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor, mix: Tensor) -> Tensor:
        hidden = x @ A.mT  # (n, R)
        ctx.save_for_backward(x, A, B, mask, mix, hidden)
        return torch.addmm(out, hidden * mask[mix], B.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, mask, mix, hidden = ctx.saved_tensors
        by_token, inner = mask[mix], grad @ B  # (n, R)
        grad_B = grad.mT @ (hidden * by_token)
        grad_mask = _sums(inner * hidden, mix, len(mask)) if ctx.needs_input_grad[4] else None
        inner *= by_token
        grad_x = inner @ A if ctx.needs_input_grad[1] else None
        return grad, grad_x, inner.mT @ x, grad_B, grad_mask, None


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
