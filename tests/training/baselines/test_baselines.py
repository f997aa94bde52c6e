"""Every baseline on a tiny bench, and the laws of those that choose weights."""

import numpy as np
import pytest
import torch
from torch import Tensor

from training.baselines import BASELINES, adaptersoup, lorahub, model_soup, nearest, poly
from training.baselines.answering import few, losses, under
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result
from training.suite.modules import one_hot, resident
from training.suite.workbench import Workbench


def run(name: str, bench: Workbench, nodes: Nodes, recipe: Recipe) -> Result:
    return BASELINES[name].run(bench, nodes, recipe)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_answers_and_again_the_same(
    name: str, bench: Workbench, nodes: Nodes, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lorahub, "EVALUATIONS", 5)
    results = [run(name, bench, nodes, recipe) for _ in range(2 if bench.tail.first else 1)]
    for result in results:
        for accuracy in (result.accuracy, result.facts["accuracy_refitted"]):
            assert len(accuracy) == len(bench.tasks)
            assert all(0 <= share <= 1 for share in accuracy)
        if result.weights is not None:
            assert result.weights.shape[0] == len(bench.tasks)
            assert result.weights.shape[2] == bench.num_layers
            assert not result.weights.requires_grad
    assert results[0].accuracy == results[-1].accuracy
    assert results[0].facts == results[-1].facts


def test_the_registry_says_whose_idea_each_is() -> None:
    assert all(method.name == name and method.source for name, method in BASELINES.items())
    assert [name for name, method in BASELINES.items() if method.regime == "joint"] == [
        "shared",
        "shared_tied",
        "uniform_joint",
        "poly",
    ]


@pytest.mark.parametrize("name", [name for name, method in BASELINES.items() if method.regime == "pluggable"])
def test_test_texts_run_once(
    name: str, bench: Workbench, nodes: Nodes, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the final accuracy may see them; xlora's first pass over the bare backbone is its own."""
    seen, pool, tests = [], bench.tail.pool, {id(row) for part in bench.test for row in part.rows}
    monkeypatch.setattr(lorahub, "EVALUATIONS", 2)
    monkeypatch.setattr(bench.tail, "pool", lambda rows, *rest: seen.extend(map(id, rows)) or pool(rows, *rest))
    run(name, bench, nodes, recipe)
    times = sum(row in tests for row in seen) / len(tests)
    assert times == (2 if name == "xlora" else 1)


def test_single_is_each_task_s_own_adapter(bench: Workbench, nodes: Nodes, recipe: Recipe) -> None:
    assert torch.equal(run("single", bench, nodes, recipe).weights, one_hot(3, bench.num_layers))


def test_nearest_is_the_most_similar_other_task(
    bench: Workbench, nodes: Nodes, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "similarity", lambda bench: np.array([[1, 0.1, 0.9], [0.2, 1, 0.1], [0, -0.1, 1]]))
    result = run("nearest", bench, nodes, recipe)
    assert result.facts["nearest"] == [bench.names[k] for k in (2, 0, 0)]
    assert torch.equal(result.weights[:, :, 0], torch.eye(3)[[2, 0, 0]])


def test_an_adaptersoup_has_the_task_s_own_adapter_and_its_nearest() -> None:
    similar = np.array([[1, 0.9, 0.1, 0.2], [0.9, 1, 0.3, 0.1], [0.1, 0.3, 1, 0.8], [0.2, 0.1, 0.8, 1]])
    expected = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]]) / 3
    torch.testing.assert_close(adaptersoup.rows(similar, 3), expected)
    torch.testing.assert_close(adaptersoup.rows(similar, 9), torch.full((4, 4), 0.25))


def test_a_greedy_soup_is_no_worse_than_its_best_member(bench: Workbench, nodes: Nodes) -> None:
    split = few(bench)
    with resident(bench.tail, [adapter.entries for adapter in nodes.adapters]):
        chosen = model_soup.soup(bench, nodes, split)
    found = losses(nodes.heads, under(bench, nodes, _weights(chosen, bench))(split), split)
    for k in range(3):
        alone = losses(nodes.heads, under(bench, nodes, _weights(torch.eye(3)[[k] * 3], bench))(split), split)
        assert bool((found <= alone + 1e-5).all())


def _weights(members: Tensor, bench: Workbench) -> Tensor:
    rows = members / members.sum(dim=1, keepdim=True)
    return rows[:, :, None].expand(-1, -1, bench.num_layers).contiguous()


def test_a_soup_takes_what_helps_and_leaves_what_does_not(
    bench: Workbench, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = torch.tensor([[0.5, 0.5, 0], [0, 0, 1], [1 / 3, 1 / 3, 1 / 3]])
    scores = lambda bench, nodes, split, members: (members / members.sum(1, keepdim=True) - goal).square().sum(1)  # noqa: E731
    monkeypatch.setattr(model_soup, "_scores", scores)
    assert torch.equal(model_soup.soup(bench, nodes, []), (goal > 0).float())


def test_lorahub_is_never_worse_than_its_start(bench: Workbench, nodes: Nodes) -> None:
    split = few(bench, 8)
    with resident(bench.tail, [adapter.entries for adapter in nodes.adapters]):
        zero = torch.zeros(3, 3)
        start = lorahub.objective(bench, nodes, split, zero)
        found, values = lorahub.evolve(bench, zero, lambda rows: lorahub.objective(bench, nodes, split, rows), 6)
        again = lorahub.objective(bench, nodes, split, found)
    assert bool((values <= start).all())
    torch.testing.assert_close(again, values)


def test_lorahub_s_evolution_finds_a_minimum_within_its_bounds(bench: Workbench) -> None:
    goal = torch.tensor([[0.5, -0.5, 0.2], [3.0, 0.0, 0.0], [0.3, 0.3, 0.3]])
    zero = torch.zeros(3, 3)
    found, values = lorahub.evolve(bench, zero, lambda rows: (rows - goal).square().sum(dim=1), 400)
    torch.testing.assert_close(found, goal.clamp(-1.5, 1.5), rtol=0, atol=0.1)
    assert bool((found.abs() <= lorahub.BOUND).all())
    assert float(values[1]) == pytest.approx(2.25, abs=0.05)


def test_poly_s_rows_sum_to_one_and_start_alike() -> None:
    torch.testing.assert_close(poly.weights_of(torch.zeros(2, 4), 3), torch.full((2, 4, 3), 0.25))
    torch.testing.assert_close(poly.weights_of(torch.randn(2, 4), 3).sum(dim=1), torch.ones(2, 3))


def test_poly_learns_who_uses_what(bench: Workbench, nodes: Nodes, recipe: Recipe) -> None:
    weights = run("poly", bench, nodes, recipe).weights
    assert not torch.allclose(weights, torch.full_like(weights, 1 / poly.SKILLS), atol=1e-4)


def test_few_texts_are_few_and_the_same(bench: Workbench) -> None:
    one, two = few(bench, 4), few(bench, 4)
    assert [len(part) for part in one] == [4, 4, 4]
    assert [part.rows for part in one] == [part.rows for part in two]
