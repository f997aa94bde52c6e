"""The short training of gates and routers, and how scalars are chosen."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from training.baselines.answering import choose, under
from training.baselines.learning import learn
from training.baselines.tokenwise import pool, stacks
from training.errors import DivergedError
from training.suite.joint import Recipe
from training.suite.methods import Nodes
from training.suite.modules import one_hot
from training.suite.workbench import Texts, Workbench


def learned(bench: Workbench, nodes: Nodes, recipe: Recipe, lr: float = 0.05) -> tuple[Tensor, list[float]]:
    """A row of weights per task, trained as a gate."""
    stacked, rows = stacks(bench, nodes.adapters), torch.full((3, 3), 1 / 3, requires_grad=True)

    def pooled(texts: Texts, tasks: Tensor) -> Tensor:
        return pool(bench, stacked, texts, lambda at: rows[tasks[at.row]])

    history = learn(bench, [([rows], lr)], nodes.heads, pooled, recipe)
    return rows.detach(), history


def test_the_budget_of_tokens_changes_nothing(bench: Workbench, nodes: Nodes, recipe: Recipe) -> None:
    whole, split = (learned(bench, nodes, replace(recipe, max_tokens=tokens)) for tokens in (10_000, 32))
    torch.testing.assert_close(split[0], whole[0], rtol=1e-2, atol=1e-3)
    assert split[1] == pytest.approx(whole[1], rel=1e-3)


def test_training_lowers_the_loss(bench: Workbench, nodes: Nodes, recipe: Recipe) -> None:
    _, history = learned(bench, nodes, replace(recipe, epochs=10))
    assert sum(history[-2:]) < sum(history[:2])


def test_a_loss_that_is_no_number_is_told(bench: Workbench, nodes: Nodes, recipe: Recipe) -> None:
    odd = Nodes(nodes.adapters, [(weight * torch.nan, bias) for weight, bias in nodes.heads])
    with pytest.raises(DivergedError, match="lower the learning rates"):
        learned(bench, odd, recipe)


def test_the_choice_has_the_least_loss_of_the_table(bench: Workbench, nodes: Nodes) -> None:
    pools = {mass: under(bench, nodes, mass * one_hot(3, bench.num_layers)) for mass in (0.0, 0.5, 1.0)}
    best, facts = choose(bench, nodes, pools)
    table = dict(facts["search"])
    assert list(table) == [0.0, 0.5, 1.0]
    assert facts["chosen"] == best == min(table, key=table.get)
