"""Ours on a tiny bench: masses, composing what was trained apart, co-training, frozen modules, unknown tasks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters_store import composition
from adapters_store.graph import Knobs
from tests.strategies import light
from training.composing import unknown
from training.composing.compose import Learning, learn
from training.composing.cotrain import KNOBS, Learned, Settings, cotrain
from training.composing.mass import norm_preserving
from training.composing.ours import OURS
from training.composing.pluggable import Choices, compose, prior_rows, tied_head, weights_of
from training.errors import DataError
from training.suite import relating
from training.suite.heads import Heads, HeadTensors
from training.suite.joint import Recipe
from training.suite.methods import Nodes, accuracies, pooled_under
from training.suite.modules import mixes, one_hot
from training.suite.nodes import train_nodes
from training.suite.workbench import Workbench

RECIPE = Recipe(epochs=3, batch_size=6, max_tokens=128)


@pytest.fixture
def nodes(tiny_bench: Workbench) -> Nodes:
    return train_nodes(tiny_bench, RECIPE)


@light
@given(st.integers(0, 2**32 - 1))
def test_a_mean_of_updates_gets_the_length_of_its_parts(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    updates = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    g = torch.softmax(torch.randn(2, 4, 3, generator=generator), dim=1)
    mass = norm_preserving(g, {1: (updates @ updates.mT).numpy()})
    assert (mass[:, [0, 2]] == 1).all()  # nothing acts there
    for t in range(2):
        mixed = mass[t, 1] * (g[t, :, 1].double() @ updates).norm()
        assert float(mixed) == pytest.approx(float(g[t, :, 1].double() @ updates.norm(dim=1)), rel=1e-5)
    alone = norm_preserving(torch.eye(4)[:, :, None].expand(-1, -1, 3), {1: (updates @ updates.mT).numpy()})
    torch.testing.assert_close(alone, torch.ones(4, 3))


def test_masses_of_known_cosines() -> None:
    """16 updates with cosine rho: 1 / sqrt((1 + 15 rho) / 16)."""
    for rho in (0.0, 0.05, 1.0):
        gram = np.full((16, 16), rho) + (1 - rho) * np.eye(16)
        mass = norm_preserving(torch.full((1, 16, 1), 1 / 16), {0: gram})
        assert float(mass) == pytest.approx(((1 + 15 * rho) / 16) ** -0.5, rel=1e-5)


def test_without_relations_each_task_keeps_its_adapter(tiny_bench: Workbench, nodes: Nodes) -> None:
    found = compose(tiny_bench, nodes, np.eye(3))
    torch.testing.assert_close(found.weights, one_hot(3, 2))


def test_weights_are_the_servers(tiny_bench: Workbench, nodes: Nodes) -> None:
    relations = relating.estimate(relating.of_data(tiny_bench))
    knobs = Knobs(c=0.9, epsilon=1e-3, threshold=0.2)
    rows = prior_rows(tiny_bench.names, relations, knobs)
    weights = weights_of(tiny_bench.names, rows, knobs, 2)
    for t in range(3):
        row = {name: float(w) for name, w in zip(tiny_bench.names, rows[t], strict=True) if w > 0}
        served = composition.from_prior(row, {}, knobs, 2)
        for k, name in enumerate(tiny_bench.names):
            np.testing.assert_allclose(weights[t, k].numpy(), served.get(name, np.zeros(2)), atol=1e-6)


def test_heads_are_means_of_related_ones(tiny_bench: Workbench, nodes: Nodes) -> None:
    row = torch.tensor([0.25, 0.75, 0.0])
    weight, bias = tied_head(tiny_bench, nodes.heads, row, 0, own=0.2)
    for found, which in ((weight, 0), (bias, 1)):
        mean = 0.25 * nodes.heads[0][which] + 0.75 * nodes.heads[1][which]
        torch.testing.assert_close(found, 0.2 * nodes.heads[0][which] + 0.8 * mean)
    torch.testing.assert_close(tied_head(tiny_bench, nodes.heads, row, 2, own=0.2), nodes.heads[2])  # its labels alone


def test_composing_answers_every_task(tiny_bench: Workbench, nodes: Nodes) -> None:
    found = compose(tiny_bench, nodes, relating.estimate(relating.of_data(tiny_bench)))
    assert found.weights.shape == (3, 3, 2)
    assert found.weights[0, 1, 1] > 0
    assert (found.weights[:2].sum(dim=1)[:, 1] > 1).all()
    pooled = pooled_under(tiny_bench, nodes, found.weights, tiny_bench.train)
    assert np.mean(accuracies(found.heads, pooled, tiny_bench.train)) > 0.6


def test_cotraining_starts_at_the_prior_and_learns(tiny_bench: Workbench) -> None:
    relations = relating.estimate(relating.of_data(tiny_bench))
    found = cotrain(tiny_bench, relations, RECIPE, Settings(lr=0.1))
    assert found.history.losses[-1] < found.history.losses[0]
    assert found.learned.evidence.abs().max() > 0
    assert (found.learned.R.detach() - found.learned.R0).abs().max() > 1e-3
    torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(3, 2))
    assert found.weights[0, 1, 1] > 0
    still = cotrain(tiny_bench, relations, RECIPE, Settings(learns_relations=False, learns_evidence=False))
    torch.testing.assert_close(still.learned.R.detach(), still.learned.R0)
    assert len(still.learned.tensors()) == 0


def test_leaving_out_what_the_prior_gives_nothing_changes_nothing(
    tiny_bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    relations = relating.estimate(relating.of_data(tiny_bench))
    narrow = Settings(knobs=KNOBS.model_copy(update={"neighbours": 2}))
    found = cotrain(tiny_bench, relations, RECIPE, narrow)
    monkeypatch.setattr(Learned, "mixes", lambda self, tau_gate: mixes(self.weights(tau_gate)))
    whole = cotrain(tiny_bench, relations, RECIPE, narrow)

    assert ((found.weights == 0).all(dim=2)).any()
    torch.testing.assert_close(found.weights, whole.weights)
    torch.testing.assert_close(found.learned.R_hat, whole.learned.R_hat)
    torch.testing.assert_close(found.heads, whole.heads)


def test_cotraining_without_relations_shares_nothing(tiny_bench: Workbench) -> None:
    found = cotrain(tiny_bench, np.eye(3), RECIPE)
    torch.testing.assert_close(found.weights, one_hot(3, 2))
    torch.testing.assert_close(found.learned.R.detach(), torch.eye(3))


def test_heads_are_as_wide_as_the_walk(tiny_bench: Workbench) -> None:
    """Apart where it stays at home (c = 0), one for all that share their labels as it forgets where it began."""
    fixed = Settings(learns_relations=False, learns_evidence=False)
    labels = [task.labels for task in tiny_bench.tasks]
    alike = next((i, j) for i in range(3) for j in range(i) if labels[i] == labels[j])

    def heads(c: float, *, ties: bool = True) -> list[HeadTensors]:
        knobs = KNOBS.model_copy(update={"c": c})
        return cotrain(tiny_bench, np.ones((3, 3)), RECIPE, replace(fixed, knobs=knobs, ties_heads=ties)).heads

    torch.testing.assert_close(heads(0.0), heads(0.0, ties=False))
    one, other = (heads(0.9999)[t] for t in alike)
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_evidence_grows_for_the_adapter_that_helps(tiny_bench: Workbench, nodes: Nodes) -> None:
    """Given the books' adapter and one of noise, the books' task learns to prefer its own where adapters act."""
    books = tiny_bench.only([0])
    heads = Heads.given(books.tasks, nodes.heads[:1], trained=False)
    wrong = Nodes([nodes.adapters[0], _noisy(nodes.adapters[1])], nodes.heads[:1])
    before = [tensor.clone() for entry in wrong.adapters[0].entries for tensor in entry.tensors.values()]
    Pi = torch.tensor([[0.8, 0.2]])
    found = learn(books, wrong.adapters, heads, Pi, None, Recipe(epochs=20, batch_size=6), learning=Learning(lr=0.2))
    assert found.weights[0, 0, 1] > 0.85
    after = [tensor for entry in wrong.adapters[0].entries for tensor in entry.tensors.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    torch.testing.assert_close(found.allocation.weights(Pi), found.weights)


def _noisy(adapter):
    torch.manual_seed(0)
    return replace(
        adapter,
        entries=[
            replace(e, tensors={n: torch.randn(t.shape) * 0.3 for n, t in e.tensors.items()}) for e in adapter.entries
        ],
    )


@pytest.mark.parametrize("run", [unknown.ours, unknown.ours_described, unknown.soup, unknown.nearest])
def test_an_unknown_task_has_nothing_of_its_own(tiny_bench: Workbench, nodes: Nodes, run) -> None:
    found = run(tiny_bench, nodes)
    assert (found.weights[range(3), range(3)] == 0).all()
    assert (found.weights.sum(dim=1)[:, 1] > 0).all()
    assert all(0 <= accuracy <= 1 for accuracy in found.accuracy)


def test_of_an_unknown_task_no_more_than_the_few_texts_are_looked_at(
    tiny_bench: Workbench, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unknown, "EXAMPLES", 4)
    first, *others = tiny_bench.train
    assert len(first) > 4
    cut = replace(tiny_bench, train=[first.take(range(4)), *others])

    for run in (unknown.ours, unknown.ours_described, unknown.soup, unknown.nearest):
        whole, known = run(tiny_bench, nodes), run(cut, nodes)
        assert known.accuracy[0] == whole.accuracy[0]
        torch.testing.assert_close(known.weights[0], whole.weights[0])


def test_an_unknown_tasks_own_adapter_and_head_are_never_read(tiny_bench: Workbench, nodes: Nodes) -> None:
    other = Nodes(
        [_noisy(nodes.adapters[0]), *nodes.adapters[1:]],
        [(nodes.heads[0][0] + 5, nodes.heads[0][1] - 3), *nodes.heads[1:]],
    )
    for run in (unknown.ours, unknown.ours_described, unknown.nearest, unknown.arrows):
        assert run(tiny_bench, other).accuracy[0] == run(tiny_bench, nodes).accuracy[0]


def test_a_renamed_graph_keeps_its_degrees() -> None:
    rng = np.random.default_rng(0)
    relations = rng.random((6, 6))
    np.fill_diagonal(relations, 1)
    found = relating.renamed(relations, 1)
    np.testing.assert_allclose(np.sort(found.sum(axis=1)), np.sort(relations.sum(axis=1)))
    np.testing.assert_allclose(found.diagonal(), 1)
    assert not np.allclose(found, relations)


def test_mixes_of_composed_weights_run(tiny_bench: Workbench, nodes: Nodes) -> None:
    assert len(mixes(compose(tiny_bench, nodes, np.ones((3, 3)), Choices(c=0.5)).weights)) == 3


def test_a_suite_of_one_task_has_no_unknown_tasks(tiny_bench: Workbench, nodes: Nodes) -> None:
    alone = Nodes(nodes.adapters[:1], nodes.heads[:1])
    for method in (method for method in OURS.values() if method.regime == "unknown"):
        with pytest.raises(DataError, match="at least 2 tasks"):
            method.run(tiny_bench.only([0]), alone)
