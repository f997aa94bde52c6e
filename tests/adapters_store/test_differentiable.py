"""Low-rank deltas with gradients as one node, against plain torch: values and gradients."""

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters_store.mixing import Mix, MixedBatch, Selection
from adapters_store.primitives import differentiable, two_layer
from adapters_store.primitives.base import add_at, pick
from adapters_store.primitives.two_layer import Pair

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
