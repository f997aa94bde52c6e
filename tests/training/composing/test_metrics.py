"""Metrics of weights and of training: their laws, then what they give by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import light
from training.composing import metrics

seeds = st.integers(0, 2**32 - 1)


def draw(seed, *shape):
    return np.random.default_rng(seed).random(shape)


@light
@given(seeds, st.floats(0.1, 10))
def test_weight_precision_is_a_share_and_one_only_for_equal_weights(seed, factor):
    found, true = draw(seed, 4, 3), draw(seed + 1, 4, 3)
    precision = metrics.weight_precision(found, true)
    assert 0 <= precision < 1
    assert metrics.weight_precision(true, found) == pytest.approx(precision)
    assert metrics.weight_precision(factor * found, found) == pytest.approx(1)
    assert metrics.weight_precision(factor * found, true) == pytest.approx(precision)


def test_weight_precision_by_hand():
    assert metrics.weight_precision([1.0, 0.0, 0.0], [0.0, 0.5, 0.5]) == 0
    assert metrics.weight_precision([0.6, 0.4, 0.0], [0.5, 0.3, 0.2]) == pytest.approx(0.8)


@light
@given(seeds, st.integers(0, 3))
def test_leaving_one_out_keeps_the_mass_and_the_proportions_of_the_others(seed, k):
    weights = draw(seed, 4, 3) * 2
    rest = metrics.without(weights, k)
    assert (rest[k] == 0).all()
    np.testing.assert_allclose(rest.sum(axis=0), weights.sum(axis=0))
    others = np.arange(4) != k
    np.testing.assert_allclose(metrics.shares(rest[others]), metrics.shares(weights[others]))


def test_a_layer_whose_only_module_is_left_out_is_empty():
    assert metrics.without([[1.0, 0.5], [0.0, 0.5]], 0).tolist() == [[0, 0], [0, 1]]


def test_weights_against_gains():
    alpha, gain = [0.5, 0.3, 0.15, 0.05], [0.02, -0.01, 0.01, 0.0]
    assert metrics.useful_share(alpha, gain) == pytest.approx(0.65)
    assert metrics.precision_at(alpha, gain, 1) == 1
    assert metrics.precision_at(alpha, gain, 2) == 0.5
    assert metrics.precision_at(alpha, gain, 9) == 1
    assert metrics.rank_agreement(alpha, alpha) == pytest.approx(1)
    assert metrics.rank_agreement(alpha, [-a for a in alpha]) == pytest.approx(-1)
    assert metrics.rank_agreement(alpha, [1, 1, 1, 1]) is None
    assert metrics.rank_agreement(alpha[:2], gain[:2]) is None


@light
@given(seeds)
def test_effective_modules_are_between_one_and_all(seed):
    assert 1 <= metrics.effective_modules(draw(seed, 5, 3)) <= 5


def test_effective_modules_and_active_slots_by_hand():
    assert metrics.effective_modules([3.0, 0.0, 0.0]) == pytest.approx(1)
    assert metrics.effective_modules(np.ones((5, 2))) == pytest.approx(5)
    assert metrics.active_slots([[0.5, 0.0], [0.5, 1.0]], [[8, 8], [4, 4]]) == 16
    assert metrics.active_slots([[0.5, -0.1]], [[8, 8]]) == 16


def test_flips_are_changes_of_the_heaviest_module():
    assert metrics.path_flips([[1, 1, 1], [0, 0, 0]]) == 0
    assert metrics.path_flips([[1, 0, 1], [0, 1, 0]]) == 1
    assert metrics.path_flips([[0.6, 0.4, 0.4], [0.4, 0.6, 0.6]]) == 0.5
    assert metrics.path_flips([[1.0], [0.0]]) == 0


def test_stability():
    assert metrics.seed_deviation([[0.8, 0.5], [0.8, 0.5]]) == 0
    assert metrics.seed_deviation([[0.0, 0.5], [1.0, 0.5]]) == pytest.approx(np.sqrt(0.5) / 2)
    falling = 2 - 0.01 * np.arange(50) + 0.001 * np.sin(np.arange(50))
    assert metrics.loss_spikes(falling, width=50) == 0
    spiked = falling.copy()
    spiked[20] += 3  # up and down again
    assert metrics.loss_spikes(spiked, width=50) == 2
    assert metrics.loss_spikes([1.0]) == 0
    assert metrics.norm_variation([2.0, 2.0, 2.0]) == 0
    assert metrics.norm_variation([1.0, 3.0]) == pytest.approx(0.5)
    assert metrics.norm_variation([0.0, 0.0]) == 0
