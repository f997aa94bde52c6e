"""Composition from a prior row: sums, limits, gates, and what one more module changes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store import composition
from adapters_store.errors import InvalidCompositionError
from adapters_store.graph import Knobs, RelationGraph
from adapters_store.prior import Prior
from tests.strategies import light

LAYERS = 3
seeds = st.integers(0, 2**32 - 1)
knobs = st.builds(
    Knobs,
    temperature=st.floats(0.1, 5),
    strength=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    threshold=st.floats(0, 1),
    top_k=st.none() | st.integers(1, 5),
    path=st.sampled_from(["none", "marginals", "viterbi"]),
    path_threshold=st.floats(0, 1),
    num_paths=st.integers(1, 3),
    stay=st.sampled_from([0.0, 0.5, 1.0]),
)


def case(seed, size=5):
    """A prior row, evidence, and rows of the modules."""
    rng = np.random.default_rng(seed)
    modules = [f"m{k}" for k in range(size)]
    rows = {name: dict(zip(modules, rng.dirichlet(np.ones(size)).tolist(), strict=True)) for name in modules}
    evidence = {name: rng.normal(0, 2, LAYERS).tolist() for name in modules}
    return rows["m0"], evidence, rows.__getitem__


def stacked(found, modules):
    return np.stack([found.get(module, np.zeros(LAYERS)) for module in modules])


@light
@given(seeds, knobs, st.lists(st.floats(0, 50), min_size=LAYERS, max_size=LAYERS))
def test_weights_sum_to_the_mass_at_every_layer(seed, knobs, mass):
    row, evidence, rows = case(seed)
    found = composition.from_prior(row, evidence, knobs, LAYERS, mass, rows)
    np.testing.assert_allclose(stacked(found, row).sum(axis=0), mass, rtol=1e-5, atol=1e-6)
    whole = stacked(composition.from_prior(row, evidence, knobs, LAYERS, (), rows), row)
    np.testing.assert_allclose(whole.sum(axis=0), 1, rtol=1e-5)
    np.testing.assert_allclose(stacked(found, row), whole * mass, rtol=1e-5, atol=1e-6)
    assert knobs.top_k is None or len(found) <= knobs.top_k


@light
@given(seeds)
def test_without_gates_weights_are_prior_times_likelihood(seed):
    row, evidence, _ = case(seed)
    found = stacked(composition.from_prior(row, evidence, Knobs(threshold=0, temperature=2, strength=0.5), LAYERS), row)
    raw = np.array([[row[m] ** 0.5 * np.exp(e / 2) for e in evidence[m]] for m in row])
    np.testing.assert_allclose(found, raw / raw.sum(axis=0), rtol=1e-5)


@light
@given(seeds)
def test_limits(seed):
    row, evidence, _ = case(seed)
    prior = np.array(list(row.values()))[:, None]
    of = lambda **knobs: stacked(  # noqa: E731
        composition.from_prior(row, evidence, Knobs(threshold=0, **knobs), LAYERS), row
    )
    np.testing.assert_allclose(of(temperature=1e9), np.broadcast_to(prior, (5, LAYERS)), rtol=1e-5)
    likelihood = np.exp(np.array([evidence[m] for m in row]))
    np.testing.assert_allclose(of(strength=0.0), likelihood / likelihood.sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(of(temperature=1e9, strength=0.0), 1 / 5, rtol=1e-5)
    heaviest = np.array([evidence[m] for m in row]).argmax(axis=0)
    np.testing.assert_allclose(of(temperature=1e-3, strength=0.0).argmax(axis=0), heaviest)


def test_a_walk_that_goes_nowhere_composes_the_task_alone():
    prior = Prior(RelationGraph.of({"a": None, "b": None}, {("a", "b"): 1.0}, knobs={"c": 0.0}))
    found = composition.from_prior(prior.row("a"), {}, prior.knobs, LAYERS)
    assert {name: weights.tolist() for name, weights in found.items()} == {"a": [1, 1, 1]}


@light
@given(seeds, st.floats(0, 0.9))
def test_one_more_module_changes_the_others_only_by_renormalisation(seed, share):
    row, evidence, _ = case(seed)
    wider = {name: weight * (1 - share) for name, weight in row.items()} | ({"new": share} if share else {})
    knobs = Knobs(threshold=0)
    before = stacked(composition.from_prior(row, evidence, knobs, LAYERS), row)
    after = stacked(composition.from_prior(wider, evidence, knobs, LAYERS), row)
    np.testing.assert_allclose(after / after.sum(axis=0), before, rtol=1e-4, atol=1e-6)


def test_a_module_that_no_walk_reaches_changes_nothing():
    nodes, edges = dict.fromkeys(["a", "b"]), {("a", "b"): 0.7, ("b", "a"): 0.2}
    before = Prior(RelationGraph.of(nodes, edges)).row("a")
    after = Prior(RelationGraph.of(nodes | {"new": None}, edges | {("new", "a"): 1.0})).row("a")
    assert after == pytest.approx(before)


@light
@given(seeds, knobs)
def test_without_mass_and_rows_nothing_is_new(seed, knobs):
    """Optional arguments left out: mass 1, and paths that know no relations."""
    row, evidence, _ = case(seed)
    plain = composition.from_prior(row, evidence, knobs, LAYERS)
    alone = composition.from_prior(row, evidence, knobs, LAYERS, [1.0] * LAYERS, lambda module: {module: 1.0})
    np.testing.assert_array_equal(stacked(plain, row), stacked(alone, row))


def test_evidence_of_another_backbone_is_refused():
    with pytest.raises(InvalidCompositionError, match="evidence for a has 2 layers, the backbone has 3"):
        composition.from_prior({"a": 1.0}, {"a": [0.0, 0.0]}, Knobs(), LAYERS)
