"""Targets that are known mixtures of known sources: weights are found, communities seen, and a wrong graph misleads."""

import pytest

from tests.bench.synthetic import measure


def test_weights_of_known_mixtures_are_found() -> None:
    found = measure(60, 1)
    assert found["inside_least"] > found["across_largest"] + 0.1  # R recovers the planted communities
    assert found["ours"] > 0.8
    assert found["ours"] > found["prior_alone"]
    assert found["random_graph"] < found["ours"] - 0.2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weights_are_precise_with_two_hundred_examples(seed: int) -> None:
    found = measure(200, seed)
    assert found["ours"] >= 0.9
    assert found["random_graph"] < found["ours"] - 0.2
