"""Every term of the loss against its formula written out with dense updates."""

import pytest
import torch

from training.composing import losses
from training.composing.losses import LossWeights

RANKS = (2, 3, 1)


@pytest.fixture
def material():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    factors = {
        site: ([draw(r, d_in) for r in RANKS], [draw(d_out, r) for r in RANKS])
        for site, (d_in, d_out) in {"q": (5, 4), "up": (5, 7)}.items()
    }
    R = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    return R.fill_diagonal_(1), factors


def pairs(R):
    both = (R + R.mT) / 2
    return [(i, j, both[i, j]) for i in range(3) for j in range(i + 1, 3)]


def test_smoothness_is_that_of_dense_updates(material):
    R, factors = material
    expected = sum(r * ((B[i] @ A[i] - B[j] @ A[j]) ** 2).sum() for A, B in factors.values() for i, j, r in pairs(R))
    torch.testing.assert_close(losses.smoothness(R, factors), expected)


def test_orthogonality_is_that_of_its_formula(material):
    R, factors = material
    expected = sum((1 - r) * ((A[i] @ A[j].mT) ** 2).sum() for A, _ in factors.values() for i, j, r in pairs(R))
    torch.testing.assert_close(losses.orthogonality(R, factors), expected)


def test_gram_is_the_trace_identity(material):
    _, factors = material
    for A, B in factors.values():
        dense = torch.stack([(b @ a).flatten() for a, b in zip(A, B, strict=True)])
        torch.testing.assert_close(losses.update_gram(A, B), dense @ dense.mT)


def test_relations_drift_and_sparsity(material):
    R, _ = material
    assert losses.drift(R, R) == 0
    torch.testing.assert_close(losses.drift(R + 0.5, R), torch.tensor(9 * 0.25, dtype=torch.float64))
    torch.testing.assert_close(losses.sparsity(R), R.sum() - 3)


def test_terms_of_the_weights():
    Pi = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    same = Pi[:, :, None].expand(-1, -1, 4)
    assert losses.divergence(same, Pi).abs() < 1e-6
    one = torch.zeros(2, 3, 4).index_fill(1, torch.tensor([0]), 1.0)
    torch.testing.assert_close(losses.divergence(one, Pi), -(Pi[0, 0].log() + Pi[1, 0].log()))
    assert losses.entropy(one) == 0
    torch.testing.assert_close(losses.entropy(torch.full((2, 3, 4), 1 / 3)), torch.tensor(3.0).log())
    assert losses.balance(torch.full((2, 3, 4), 1 / 3)) < 1e-12
    torch.testing.assert_close(losses.balance(one), torch.tensor(2.0))


def test_every_term_can_be_switched_off(material):
    R, factors = material
    alpha, Pi = torch.full((3, 3, 2), 1 / 3, dtype=torch.float64), torch.full((3, 3), 1 / 3, dtype=torch.float64)
    off = dict.fromkeys(LossWeights.model_fields, 0.0)
    assert losses.penalty(LossWeights(**off), R, R + 1, alpha, Pi, factors) == 0
    for name in off:
        total = losses.penalty(LossWeights(**off | {name: 2.0}), R, R + 1, alpha, Pi * 0.5, factors)
        once = losses.penalty(LossWeights(**off | {name: 1.0}), R, R + 1, alpha, Pi * 0.5, factors)
        torch.testing.assert_close(total, 2 * once)
