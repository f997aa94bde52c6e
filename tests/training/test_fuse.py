"""How views become one relation matrix: ranks, shares, measured harm, the strongest few."""

import numpy as np
import pytest

from training.relations.fuse import agreement, fuse, rank_normalise, shares, strongest, with_negatives
from training.relations.transfer import Transfer


def test_ranks_ignore_scale_and_keep_order() -> None:
    generator = np.random.default_rng(0)
    view = generator.normal(size=(5, 5))

    ranked = rank_normalise(view)

    off = ~np.eye(5, dtype=bool)
    np.testing.assert_allclose(ranked, rank_normalise(np.exp(3 * view) - 7))
    assert ranked[off].min() == 0
    assert ranked[off].max() == 1
    assert (np.argsort(ranked[off]) == np.argsort(view[off])).all()
    assert (np.diagonal(ranked) == 1).all()
    assert (rank_normalise(np.ones((3, 3)))[~np.eye(3, dtype=bool)] == 0.5).all()


def test_fusion_is_the_weighted_mean_of_ranked_views() -> None:
    generator = np.random.default_rng(0)
    views = {"a": generator.normal(size=(4, 4)), "b": generator.normal(size=(4, 4))}

    by_view = shares(["a", "b"], {"a": 3})

    assert by_view == {"a": 0.75, "b": 0.25}
    fused = fuse(views, by_view)
    np.testing.assert_allclose(fused, 0.75 * rank_normalise(views["a"]) + 0.25 * rank_normalise(views["b"]))
    np.testing.assert_allclose(fuse({"a": views["a"]}, {"a": 1.0}), rank_normalise(views["a"]))


def test_only_clearly_negative_transfer_becomes_a_negative_edge() -> None:
    change = np.array([[0.5, -0.8, -0.1], [0.2, 0.4, -0.4], [0.0, 0.1, 0.3]])
    transfer = Transfer(change, np.full((3, 3), 0.1), np.zeros((3, 3)))
    relations = np.full((3, 3), 0.6)

    found = with_negatives(relations, transfer)

    assert found[0, 1] == -1
    assert found[1, 2] == -0.5
    assert found[0, 2] == 0.6  # within two standard errors of zero


def test_strongest_keeps_the_largest_and_the_negative() -> None:
    relations = np.array([[1, 0.9, 0.2, -0.5], [0.1, 1, 0.3, 0.2], [0.5, 0.5, 1, 0.5], [-1, -1, -1, 1]])

    kept = strongest(relations, 1)

    assert kept[0].tolist() == [1, 0.9, 0, -0.5]
    assert kept[1].tolist() == [0, 1, 0.3, 0]
    assert (kept[2] > 0).sum() == 2
    assert kept[3].tolist() == [-1, -1, -1, 1]
    assert (strongest(relations, None) == relations).all()


def test_agreement_is_spearmans_rank_correlation() -> None:
    measured = np.arange(16.0).reshape(4, 4)

    found = agreement({"same": measured**3, "reversed": -measured, "constant": np.ones((4, 4))}, measured)

    assert found["same"] == pytest.approx(1)
    assert found["reversed"] == pytest.approx(-1)
    assert found["constant"] is None
