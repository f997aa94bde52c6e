"""Path selection against enumeration of all paths, and through composition."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store import composition, paths
from adapters_store.graph import Knobs
from tests.strategies import light

seeds = st.integers(0, 2**32 - 1)


def chain(seed, modules=4, depth=4, zeros=0.0):
    rng = np.random.default_rng(seed)
    alpha = rng.dirichlet(np.ones(modules), depth).T
    alpha[rng.random(alpha.shape) < zeros] = 0
    alpha[rng.integers(modules, size=depth), range(depth)] += 0.3
    return alpha / alpha.sum(axis=0), rng.dirichlet(np.ones(modules), modules)


def every_path(scores, edges):
    """(score, path) of all paths, best first: the specification."""
    modules, depth = scores.shape
    found = []
    for path in itertools.product(range(modules), repeat=depth):
        score = sum(scores[k, d] for d, k in enumerate(path))
        score += sum(edges[j, k] for j, k in itertools.pairwise(path))
        found.append((score, path))
    return sorted(found, key=lambda item: (-item[0], item[1]))


def logs(alpha, diffused, stay=0.8, strength=1.0):
    with np.errstate(divide="ignore"):
        return np.log(alpha), strength * np.log(paths.transition(diffused, stay))


@light
@given(seeds, st.sampled_from([0.0, 0.4]), st.floats(0, 3))
def test_marginals_are_those_of_all_paths(seed, zeros, strength):
    alpha, diffused = chain(seed, zeros=zeros)
    scores, edges = logs(alpha, diffused, strength=strength)
    expected, total = np.zeros_like(alpha), 0.0
    for score, path in every_path(scores, edges):
        total += np.exp(score)
        expected[list(path), range(len(path))] += np.exp(score)
    np.testing.assert_allclose(paths.marginals(scores, edges), expected / total, atol=1e-10)


@light
@given(seeds, st.integers(1, 7))
def test_the_best_paths_are_the_best_of_all(seed, count):
    scores, edges = logs(*chain(seed))
    found = paths.best_paths(scores, edges, count)
    assert [path for _, path in found] == [path for _, path in every_path(scores, edges)[:count]]


@light
@given(seeds, st.sampled_from(["marginals", "viterbi"]), st.floats(0, 1), st.integers(1, 4))
def test_no_depth_is_emptied(seed, how, threshold, count):
    alpha, diffused = chain(seed, zeros=0.5)
    kept = paths.keep(alpha, diffused, Knobs(path=how, path_threshold=threshold, num_paths=count))
    assert (alpha * kept).sum(axis=0).min() > 0


def test_a_path_that_always_stays_but_cannot_keeps_what_alpha_has():
    """Two depths with one module each, and no way between: rho = 1 allows no change."""
    alpha = np.array([[1.0, 0.0], [0.0, 1.0]])
    for how in ("marginals", "viterbi"):
        kept = paths.keep(alpha, np.eye(2), Knobs(path=how, stay=1.0))
        np.testing.assert_array_equal(kept, alpha > 0)


def test_without_strength_marginals_are_alpha():
    alpha, diffused = chain(3)
    scores, edges = logs(alpha, diffused, strength=0.0)
    np.testing.assert_allclose(paths.marginals(scores, edges), alpha)


@light
@given(seeds, st.floats(0, 1))
def test_transitions_are_distributions(seed, stay):
    _, diffused = chain(seed)
    Q = paths.transition(diffused, stay)
    np.testing.assert_allclose(Q.sum(axis=1), 1)
    np.testing.assert_allclose(paths.transition(np.zeros((4, 4)), stay), np.eye(4))  # no relations: stay


def test_one_best_path_leaves_one_module_per_layer():
    row = {"books": 0.5, "films": 0.3, "music": 0.2}
    evidence = {"books": [1.0, 1.0, -3.0], "films": [0.0, 0.0, 3.0]}
    knobs = Knobs(path="viterbi", num_paths=1, stay=0.0)
    related = dict.fromkeys(row, row)
    found = composition.from_prior(row, evidence, knobs, 3, diffused=related.__getitem__)
    assert {name: weights.tolist() for name, weights in found.items()} == {"books": [1, 1, 0], "films": [0, 0, 1]}


def test_weights_sum_to_the_mass():
    found = composition.from_prior({"a": 0.7, "b": 0.3}, {}, Knobs(), 3, [1.0, 2.5, 0.0])
    np.testing.assert_allclose(sum(found.values()), [1.0, 2.5, 0.0], rtol=1e-6)


def test_mass_of_another_backbone_is_refused():
    with pytest.raises(composition.InvalidCompositionError, match="mass has 2 layers, the backbone has 3"):
        composition.from_prior({"a": 1.0}, {}, Knobs(), 3, [1.0, 2.0])
