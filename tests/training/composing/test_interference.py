"""Conflict and redundancy: bounds, limits, and equality with dense updates."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import light
from training.composing import interference, losses

seeds = st.integers(0, 2**32 - 1)
RANKS = (2, 3, 1)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def factors(seed, d_in=7, d_out=9):
    A = [draw(seed + k, r, d_in) for k, r in enumerate(RANKS)]
    return A, [draw(seed + 10 + k, d_out, r) for k, r in enumerate(RANKS)]


@light
@given(seeds, st.floats(0.1, 10))
def test_cancellation_is_a_share_and_does_not_depend_on_scale(seed, factor):
    outputs, g = draw(seed, 3, 4, 5), np.abs(draw(seed + 1, 3))
    found = interference.cancellation(outputs, g)
    assert 0 <= found <= 1
    assert interference.cancellation(factor * outputs, g) == pytest.approx(found)
    assert interference.cancellation(outputs, factor * g) == pytest.approx(found)


def test_aligned_outputs_do_not_cancel_and_opposed_ones_do():
    one = draw(0, 1, 4, 5)
    aligned, opposed = np.concatenate([one, 2 * one]), np.concatenate([one, -one])
    assert interference.cancellation(aligned, [0.5, 0.5]) == pytest.approx(0)
    assert interference.cancellation(opposed, [0.5, 0.5]) == pytest.approx(1)
    assert interference.cancellation(opposed, [0.75, 0.25]) == pytest.approx(0.5)
    assert interference.cancellation(0 * opposed, [0.5, 0.5]) == 0


@light
@given(seeds)
def test_sign_conflict_is_at_most_half(seed):
    updates, g = [draw(seed, 3, 20), draw(seed + 1, 3, 6)], np.abs(draw(seed + 2, 3))
    assert 0 <= interference.sign_conflict(updates, g) <= 0.5


def test_sign_conflict_by_hand():
    site = np.array([[1.0, 2.0, 0.0], [-1.0, 2.0, 0.0]])
    assert interference.sign_conflict([site], [1, 1]) == pytest.approx(1 / 6)
    assert interference.sign_conflict([site, site], [1, 0.5]) == pytest.approx(0.5 / 4.5)
    assert interference.sign_conflict([site], [1, 0]) == 0
    assert interference.sign_conflict([], [1, 1]) == 0


def test_gradient_conflict_counts_only_opposed_pairs():
    assert interference.gradient_conflict([[1.0, 0.0], [-2.0, 0.0]], [0.5, 0.5]) == pytest.approx(1)
    assert interference.gradient_conflict([[1.0, 0.0], [1.0, 1.0]], [0.5, 0.5]) == 0
    three = [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]
    assert interference.gradient_conflict(three, [1, 1, 1]) == pytest.approx(1 / 3)
    assert interference.gradient_conflict(three[:1], [1]) == 0
    assert interference.gradient_conflict(three, [1, 0, 0]) == 0


@light
@given(seeds)
def test_overlap_is_that_of_dense_updates(seed):
    A, B = factors(seed)
    g = np.abs(draw(seed + 30, 3))
    dense = np.stack([(b @ a).ravel() for a, b in zip(A, B, strict=True)])
    norms = np.linalg.norm(dense, axis=1)
    cos = dense @ dense.T / np.outer(norms, norms)
    expected = sum(g[i] * g[j] * cos[i, j] ** 2 for i in range(3) for j in range(i + 1, 3))
    gram = losses.update_gram([torch.from_numpy(a) for a in A], [torch.from_numpy(b) for b in B]).numpy()
    assert interference.overlap(gram, g) == pytest.approx(expected)


@light
@given(seeds)
def test_singular_values_are_those_of_the_dense_update(seed):
    A, B = factors(seed)
    wide, tall = np.concatenate(A), np.concatenate(B, axis=1)
    expected = np.linalg.svd(tall @ wide, compute_uv=False)
    found = interference.singular_values(wide, tall)
    np.testing.assert_allclose(found, expected[: len(found)], atol=1e-10)
    assert 0 < interference.rank_use(A, B, np.abs(draw(seed + 30, 3))) <= 1 + 1e-12


def test_a_module_twice_uses_half_of_its_slots():
    A, B = [np.eye(2, 5)], [np.eye(6, 2)]
    assert interference.rank_use(A, B, [0.7]) == pytest.approx(1)
    assert interference.rank_use(A * 2, B * 2, [0.5, 0.5]) == pytest.approx(0.5)
    assert interference.rank_use(A * 2, B * 2, [0.5, 0.0]) == pytest.approx(1)
    assert interference.rank_use(A * 2, B * 2, [0.5, -0.5]) == 0
    assert interference.rank_use(A, B, [0.0]) == 0


def test_idle_slots_are_those_that_add_next_to_nothing():
    x = draw(0, 10, 5)
    A, B = [np.eye(2, 5), np.eye(1, 5)], [np.diag([1.0, 1e-4]), np.array([[0.0], [1.0]])]
    assert interference.idle_slots(A, B, [1, 1], x) == pytest.approx(1 / 3)
    assert interference.idle_slots(A, B, [1, 0], x) == pytest.approx(1 / 2)  # slots without weight are not active
    assert interference.idle_slots(A, B, [1, 1e-6], x) == pytest.approx(2 / 3)
    assert interference.idle_slots(A, B, [0, 0], x) == 0
