"""Deltas with gradients: low rank as one node against plain torch, and what overflows at a neighbour."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from adapters_store.mixing import Mix, MixedBatch, Selection
from adapters_store.primitives import differentiable, two_layer
from adapters_store.primitives.base import add_at, pick
from adapters_store.primitives.two_layer import Activation, Pair

D_IN, D_OUT = 7, 5


def _pairs(ranks: Sequence[int], generator: torch.Generator) -> list[Pair]:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [Pair(drawn(rank, D_IN), drawn(D_OUT, rank)) for rank in ranks]


def _gradients(form: str, lengths: Sequence[int], ranks: Sequence[int], *, learned: bool, seed: int) -> list[Tensor]:
    """The result and the gradients of everything, in float64. Rows run under the mixes in turn, then bare."""
    generator = torch.Generator().manual_seed(seed)
    pairs = _pairs(ranks, generator)
    weights = torch.rand(len(ranks), len(ranks), 1, generator=generator) + 0.1
    if not learned:
        weights = torch.eye(len(ranks))[:, :, None] * weights
    weights = weights.requires_grad_(learned)
    slots = tuple(range(len(ranks)))
    mixes = [*(Mix(slots, row if learned else row.numpy()) for row in weights), None]
    batch = MixedBatch.of([(length, mixes[i % len(mixes)]) for i, length in enumerate(lengths)], 1)
    active = tuple(batch.slots.tolist())
    x, out = (
        torch.randn(sum(lengths), width, generator=generator, dtype=torch.float64).requires_grad_()
        for width in (D_IN, D_OUT)
    )
    of_active, selection = [pairs[slot] for slot in active], batch.select(active)
    found = _run(form, out, x, of_active, selection)
    found.square().sum().backward()  # type: ignore[no-untyped-call]
    leaves = [out, x, *(part for pair in of_active for part in (pair.A, pair.B)), *([weights] if learned else [])]
    return [found.detach(), *(torch.zeros(()) if leaf.grad is None else leaf.grad for leaf in leaves)]


def _run(form: str, out: Tensor, x: Tensor, pairs: Sequence[Pair], selection: Selection) -> Tensor:
    if form == "plain":
        return add_at(out, selection.tokens, two_layer.dense(pick(x, selection.tokens), pairs, selection, 0, None))
    weights = selection.weights(0)
    chosen = two_layer.acting(weights, selection)
    return differentiable.by_mix(out, x, pairs, chosen, weights, selection)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=7),
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    learned=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_node_is_plain_torch(lengths: list[int], ranks: list[int], learned: bool, seed: int) -> None:
    found = _gradients("by_mix", lengths, ranks, learned=learned, seed=seed)

    expected = _gradients("plain", lengths, ranks, learned=learned, seed=seed)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # weights are float32


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("form", "f"), [("by_mix", None), ("dense", None), ("dense", F.gelu), ("fold", None), ("fold", F.gelu)]
)
def test_what_overflows_on_a_neighbours_tokens_leaves_gradients_alone(
    form: str, f: Activation | None, learned: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = 1e20, 1e-20  # each adapter fits its own row; the second one overflows on the first row
    rows = [size * torch.rand(n, D_IN, generator=generator) for size, n in zip(sizes, (5, 2), strict=True)]
    x, w = torch.cat(rows), torch.full((2, 1), 0.5)
    A = [torch.rand(3, D_IN, generator=generator) / size for size in sizes]
    B = [torch.rand(D_OUT, 3, generator=generator) for _ in sizes]
    leaves = [leaf.requires_grad_() for leaf in (x, *A, *B, *([w] if learned else []))]
    mixes = [Mix((slot,), w[slot : slot + 1] if learned else w[slot : slot + 1].numpy()) for slot in range(2)]
    selection = MixedBatch.of([(5, mixes[0]), (2, mixes[1])], 1).select((0, 1))

    pairs = list(map(Pair, A, B))
    if form == "by_mix":
        found = _run(form, torch.zeros(7, D_OUT), x, pairs, selection)
    else:
        found = getattr(two_layer, form)(x, pairs, selection, 0, f)

    hidden = [x[:5] @ A[0].mT, x[5:] @ A[1].mT]
    expected = torch.cat([w[slot] * ((f or torch.clone)(hidden[slot]) @ B[slot].mT) for slot in range(2)])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(total.square().sum(), leaves) for total in (found, expected)))
