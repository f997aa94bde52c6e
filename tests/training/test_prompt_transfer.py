"""Relations on transfer that others measured: what the bench may see, and what it finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from tests.bench.prompt_transfer import DATA, DEFAULTS, Study, by_row, helpfulness, others, run, spearman

seeds = st.integers(0, 2**32 - 1)


@given(seeds)
@settings(max_examples=20)
def test_ranks_of_rows_are_mean_ranks_without_the_rows_own_task(seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 4, size=(6, 6)).astype(float)
    known, target = (0, 2, 3, 5), 1

    found = by_row(values, known, target)

    for i in (0, 1, 2, 3, 5):
        sources = [j for j in known if j != i]
        np.testing.assert_allclose(found[i, sources], (rankdata(values[i, sources]) - 1) / (len(sources) - 1))
    assert np.isnan(found[4]).all()
    assert np.isnan(found[:, [1, 4]]).all()
    assert np.isnan(np.diagonal(found)).all()


@given(seeds)
@settings(max_examples=20)
def test_helpfulness_is_the_mean_over_other_targets(seed: int) -> None:
    measured = np.random.default_rng(seed).normal(size=(5, 5))
    known = (0, 1, 3, 4)

    found, ranked = helpfulness(measured, known), by_row(measured, known)

    for i in range(5):
        for j in known:
            assert found[i, j] == pytest.approx(np.mean([ranked[a, j] for a in known if a not in (i, j)]))


@given(seeds)
@settings(max_examples=20)
def test_rank_correlation_is_spearmans(seed: int) -> None:
    a, b = np.random.default_rng(seed).integers(0, 5, size=(2, 9)).astype(float)
    assert spearman(a, b) == pytest.approx(np.nan_to_num(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else 0)


@pytest.mark.parametrize("helps", [True, False])
@given(seeds)
@settings(max_examples=10)
def test_nothing_measured_of_a_target_is_seen(helps: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    views = {name: generator.normal(size=(7, 7)) for name in "abc"}
    measured = generator.normal(size=(7, 7))
    changed = measured.copy()
    changed[3], changed[:, 3] = generator.normal(size=7), generator.normal(size=7)
    known = others(3, 7)

    one, other = Study(views, measured, helps), Study(views, changed, helps)

    assert one.fused(3, known).tolist() == other.fused(3, known).tolist()
    assert one.diffused(3, known, DEFAULTS).tolist() == other.diffused(3, known, DEFAULTS).tolist()
    assert one._inner(known, DEFAULTS) == other._inner(known, DEFAULTS)


@pytest.mark.data
@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_fused_and_diffused_relations_predict_measured_transfer() -> None:
    lines = {line["prediction"]: line for line in run(DATA)[1:]}

    flat = max(lines[name]["spearman"] for name in ("flat cosine", "flat cosine, centred"))
    assert flat == pytest.approx(0.387, abs=0.001)
    assert lines["flat cosine"]["pooled"] == pytest.approx(0.399, abs=0.001)
    for name in ("fused", "fused, diffused, default knobs", "fused, diffused, nested knobs"):
        assert lines[name]["spearman"] > max(0.40, flat)
    assert lines["fused, diffused, nested knobs"]["interval"][0] > 0
