"""The row of a task without an adapter."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.graph import RelationGraph
from adapters_store.prior import Prior
from training.backbone import LoadedBackbone
from training.relations import Matrix
from training.relations.unknown import diffuse, embed, prior_matrix, row_from_description, row_from_states

seeds = st.integers(0, 2**32 - 1)
hows = pytest.mark.parametrize("how", ["means", "votes"])


def known_of(seed: int, size: int = 5) -> list[Matrix]:
    """Tasks in places of their own, with 4 to 11 texts each."""
    generator = np.random.default_rng(seed)
    return [
        generator.normal(size=8) * 3 + generator.normal(size=(int(generator.integers(4, 12)), 8)) for _ in range(size)
    ]


@hows
@given(seeds, st.integers(1, 5), st.permutations(range(5)))
@settings(max_examples=25, deadline=None)
def test_a_row_is_a_distribution_over_a_few_tasks_and_knows_no_order(
    how: str, seed: int, neighbours: int, order: list[int]
) -> None:
    known = known_of(seed)
    new = np.random.default_rng(seed + 1).normal(size=(6, 8)) * 3

    row = row_from_states(new, known, neighbours, how)

    assert row.sum() == pytest.approx(1)
    assert row.min() >= 0
    assert (row > 0).sum() <= neighbours or np.ptp(row) == 0
    again = row_from_states(new, [known[k] for k in order], 5, how)
    np.testing.assert_allclose(again, row_from_states(new, known, 5, how)[order], atol=1e-9)


@hows
@given(seeds, st.integers(0, 4), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_a_task_that_copies_a_known_one_gets_that_one_first(
    how: Callable, seed: int, which: int, neighbours: int
) -> None:
    known = known_of(seed)

    row = row_from_states(known[which], known, neighbours, how)

    assert int(row.argmax()) == which


def test_votes_see_a_task_that_lies_in_two_places() -> None:
    generator = np.random.default_rng(0)
    places = np.eye(4) * 10
    known = [place + generator.normal(size=(9, 4)) / 9 for place in places]
    new = np.concatenate([known[0][:4], known[1][:4]])

    row = row_from_states(new, known, 3, "votes")

    assert sorted(np.argsort(-row)[:2].tolist()) == [0, 1]
    assert row[:2].sum() == pytest.approx(1)


def test_a_task_like_no_other_gets_all_alike() -> None:
    known = [np.array([[1.0, 0]]), np.array([[-1.0, 0]])]

    assert row_from_states(np.array([[0.0, 1]]), known).tolist() == [0.5, 0.5]


def test_a_description_is_found_by_its_words(backbone: LoadedBackbone) -> None:
    texts = ["the book was good", "a lamp and a song", "really awful film"]
    known = embed(backbone, texts)

    row = row_from_description(embed(backbone, texts[1:2])[0], known, 1)

    assert known.shape == (3, 32)
    assert row.tolist() == [0, 1, 0]


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_a_diffused_row_is_the_mixture_of_its_neighbours_priors(seed: int) -> None:
    generator = np.random.default_rng(seed)
    names = ["a", "b", "c"]
    weights = {(i, j): float(generator.uniform(0.1, 1)) for i in names for j in names if i != j}
    prior = Prior(RelationGraph.of(dict.fromkeys(names), weights, knobs={"c": 0.5}))
    row = generator.dirichlet(np.ones(3))

    S = prior_matrix(prior)
    found = diffuse(row, S)

    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(diffuse(np.eye(3)[1], S), [prior.row("b")[name] for name in names])
    np.testing.assert_allclose(found, sum(w * S[k] for k, w in enumerate(row)))
