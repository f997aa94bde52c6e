"""Metrics of weights for results."""

import torch
from torch.nn.functional import cross_entropy

from tests.training.composing.test_ours import RECIPE
from training.composing import shapes
from training.suite.heads import logits
from training.suite.joint import History
from training.suite.methods import Nodes, pooled_under
from training.suite.modules import one_hot, uniform
from training.suite.nodes import train_nodes
from training.suite.workbench import Workbench


def test_shapes_of_known_weights(tiny_bench: Workbench) -> None:
    nodes, sites = train_nodes(tiny_bench, RECIPE), tiny_bench.tail.encoder.sites
    alone = shapes.of_weights(one_hot(3, 2), nodes.adapters, sites)
    assert alone == {
        "own_weight": 1, "effective_modules": 1, "active_slots": 6 * 8, "overlap": 0, "path_flips": 0,
    }  # fmt: skip
    even = shapes.of_weights(uniform(3, 3, 2, mass=2.0), nodes.adapters, sites)
    assert even["own_weight"] == round(1 / 3, 4)
    assert even["effective_modules"] == 3
    assert even["active_slots"] == 3 * 6 * 8
    assert 0 < even["overlap"] < 3 / 9


def test_weight_on_modules_that_help(tiny_bench: Workbench) -> None:
    """Each task under its own adapter alone: leaving it out hurts, leaving others out changes nothing."""
    nodes = train_nodes(tiny_bench, RECIPE)
    found = shapes.of_leaving_out(tiny_bench, nodes, one_hot(3, 2), nodes.heads)
    helped = [_gain(tiny_bench, nodes, t) > 0 for t in range(3)]
    assert found["useful_share"] == round(sum(helped) / 3, 4)
    assert set(found) == {"useful_share", "precision_at_5", "gain_agreement"}
    assert found["precision_at_5"] == 1  # there are three modules in all


def _gain(bench: Workbench, nodes: Nodes, t: int) -> float:
    """How much the own adapter changes the log-likelihood of a task's test texts."""
    head, part = nodes.heads[t], bench.test[t]
    own = pooled_under(bench, nodes, one_hot(3, 2), bench.test)[t]
    bare = pooled_under(bench, nodes, torch.zeros(3, 3, 2), bench.test)[t]
    return float(cross_entropy(logits(head, bare), part.targets) - cross_entropy(logits(head, own), part.targets))


def test_shapes_of_a_training() -> None:
    losses = [1.0, 1.1, 0.9, 1.05, 0.95, 1.1, 0.9, 1.0, 9.0]
    found = shapes.of_training(History(losses, [1.0, 1.0, 4.0]))
    assert found["loss_spikes"] == 1
    assert found["norm_variation"] == round(float(torch.tensor([1.0, 1.0, 4.0]).std(correction=0) / 2), 4)
