"""Fusion weights fitted on measured transfer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.relations import fitted
from training.relations.fuse import fuse

seeds = st.integers(0, 2**32 - 1)


def views_of(seed: int, size: int = 7) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=(size, size)) for name in ("a", "b", "c")}


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_weights_are_on_the_simplex_and_do_not_depend_on_order_or_scale(seed: int) -> None:
    views = views_of(seed)
    measured = np.random.default_rng(seed + 1).normal(size=(7, 7))

    found = fitted.weights(views, measured)
    again = fitted.weights({name: np.exp(views[name]) for name in reversed(views)}, 5 * measured - 1)

    assert sum(found.values()) == pytest.approx(1)
    assert min(found.values()) >= 0
    assert again == pytest.approx(found, abs=1e-6)


@given(seeds, st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda w: sum(w) > 0.1))
@settings(max_examples=25, deadline=None)
def test_a_planted_mixture_is_recovered(seed: int, raw: list[float]) -> None:
    planted = np.array(raw) / sum(raw)
    predictors = np.random.default_rng(seed).uniform(size=(40, 3))

    assert fitted.simplex(predictors, predictors @ planted) == pytest.approx(planted, abs=1e-4)


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_no_other_point_of_the_simplex_fits_better(seed: int) -> None:
    generator = np.random.default_rng(seed)
    predictors, wanted = generator.uniform(size=(30, 3)), generator.uniform(size=30)

    best = np.sum((predictors @ fitted.simplex(predictors, wanted) - wanted) ** 2)

    for other in generator.dirichlet(np.ones(3), size=50):
        assert best <= np.sum((predictors @ other - wanted) ** 2) + 1e-6


def test_the_view_that_is_the_transfer_gets_all_weight() -> None:
    views = views_of(3)

    found = fitted.weights(views, views["b"])

    assert found == pytest.approx({"a": 0, "b": 1, "c": 0}, abs=1e-6)
    assert fitted.left_out(views, views["b"]) == pytest.approx(1)


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_what_is_measured_of_a_target_has_no_part_in_its_own_weights(seed: int) -> None:
    views, generator = views_of(seed), np.random.default_rng(seed)
    measured = fuse(views, dict.fromkeys(views, 1 / 3))
    changed = measured.copy()
    changed[2], changed[:, 2] = generator.normal(size=7), generator.normal(size=7)
    others = np.arange(7) != 2

    def without(matrix: np.ndarray) -> np.ndarray:
        return matrix[np.ix_(others, others)]

    mine = {name: without(view) for name, view in views.items()}
    assert fitted.weights(mine, without(measured)) == fitted.weights(mine, without(changed))


def test_noise_predicts_nothing_when_its_target_is_left_out() -> None:
    found = [fitted.left_out(views_of(seed, 9), views_of(seed + 100, 9)["a"]) for seed in range(20)]

    assert abs(np.mean(found)) < 0.1


def test_too_few_tasks_say_nothing() -> None:
    assert fitted.left_out(views_of(0, 3), views_of(1, 3)["a"]) is None
