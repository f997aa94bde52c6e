"""Laws of intervals: order, shift, symmetry, sureness."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.suite.intervals import Scores, difference, mean_interval, over_tasks, t_interval

ACCURACY = st.floats(0, 1).map(lambda value: round(value, 6))


@st.composite
def two_methods(draw: st.DrawFn) -> tuple[Scores, Scores]:
    pairs = [(f"t{t}", s) for t in range(draw(st.integers(2, 6))) for s in range(draw(st.integers(1, 3)))]
    return {pair: draw(ACCURACY) for pair in pairs}, {pair: draw(ACCURACY) for pair in pairs}


@given(two_methods())
def test_intervals_hold_the_mean_and_lie_within_the_differences(both: tuple[Scores, Scores]) -> None:
    a, b = both
    found = difference(a, b)

    assert found is not None
    assert found.t is not None
    assert found.tasks is not None
    assert found.t[0] - 1e-9 <= found.mean <= found.t[1] + 1e-9
    differences = [a[pair] - b[pair] for pair in a]
    assert min(differences) - 1e-9 <= found.tasks[0] <= found.tasks[1] <= max(differences) + 1e-9


@given(two_methods())
def test_turning_the_methods_around_turns_the_sign(both: tuple[Scores, Scores]) -> None:
    there, back = difference(*both), difference(*reversed(both))

    assert there is not None
    assert back is not None
    assert there.mean == pytest.approx(-back.mean)
    assert there.t == pytest.approx((-back.t[1], -back.t[0]))  # type: ignore[index]


@given(two_methods())
def test_a_method_differs_from_itself_by_nothing(both: tuple[Scores, Scores]) -> None:
    found = difference(both[0], both[0])

    assert found is not None
    assert (found.mean, found.t, found.tasks) == (0, (0, 0), (0, 0))
    assert not found.is_sure


@given(st.lists(ACCURACY, min_size=2, max_size=20), st.floats(-1, 1))
def test_a_shift_moves_the_interval(values: list[float], shift: float) -> None:
    low, high = t_interval(values)  # type: ignore[misc]

    assert t_interval([value + shift for value in values]) == pytest.approx((low + shift, high + shift), abs=1e-9)


@given(two_methods())
def test_the_same_scores_give_the_same_interval_in_any_order(both: tuple[Scores, Scores]) -> None:
    a, b = both

    assert difference(dict(reversed(a.items())), b) == difference(a, b)


def test_the_t_interval_is_the_textbook_one() -> None:
    assert t_interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5 - 2.0542, 2.5 + 2.0542), abs=1e-3)


def test_only_common_pairs_count() -> None:
    found = difference({("a", 0): 0.9, ("a", 1): 0.1}, {("a", 0): 0.5, ("b", 0): 0.5})

    assert found is not None
    assert (found.mean, found.pairs, found.t, found.tasks) == (pytest.approx(0.4), 1, None, None)
    assert difference({("a", 0): 1.0}, {("b", 0): 1.0}) is None


def test_many_seeds_of_a_few_tasks_do_not_make_it_sure() -> None:
    a = {(task, seed): gain for task, gain in (("x", 0.1), ("y", -0.01)) for seed in range(50)}
    found = difference(a, dict.fromkeys(a, 0.0))

    assert found is not None
    assert found.t is not None
    assert found.t[0] > 0
    assert not found.is_sure


def test_the_bootstrap_covers_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        bounds = over_tasks({f"t{t}": random.normal(0, 1, 1).tolist() for t in range(20)}, draws=400)
        assert bounds is not None
        hits += bounds[0] <= 0 <= bounds[1]
    assert 175 <= hits <= 199


def test_the_mean_of_seeds() -> None:
    mean, bounds = mean_interval({("a", 0): 0.5, ("b", 0): 0.7, ("a", 1): 0.6, ("b", 1): 0.8})

    assert mean == pytest.approx(0.65)
    assert bounds is not None
    assert bounds[0] < 0.6 < 0.7 < bounds[1]
    assert mean_interval({("a", 0): 0.5}) == (0.5, None)


def test_two_tasks_that_agree_by_a_hair_are_not_sure() -> None:
    found = difference({("a", 0): 0.51, ("b", 0): 0.52}, {("a", 0): 0.5, ("b", 0): 0.5})

    assert found is not None
    assert found.tasks is not None
    assert found.tasks[0] > 0, "the bootstrap alone would be"
    assert not found.is_sure
