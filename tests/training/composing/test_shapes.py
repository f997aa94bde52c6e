"""Metrics of weights for results."""

import torch

from tests.training.composing.test_ours import RECIPE
from training.composing import shapes
from training.suite.joint import History
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


def test_shapes_of_a_training() -> None:
    losses = [1.0, 1.1, 0.9, 1.05, 0.95, 1.1, 0.9, 1.0, 9.0]
    found = shapes.of_training(History(losses, [1.0, 1.0, 4.0]))
    assert found["loss_spikes"] == 1
    assert found["norm_variation"] == round(float(torch.tensor([1.0, 1.0, 4.0]).std(correction=0) / 2), 4)
