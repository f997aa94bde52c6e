"""shared_tied: one adapter for all tasks, and one row of the heads for each label name, whoever has the label.

What a single model for the pooled data would be (Caruana 1997): what composing adds beside heads that tasks with equal
labels share is measured against this.
"""

import torch

from training.baselines.answering import RECIPE
from training.baselines.together import trained_together
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result
from training.suite.workbench import Workbench


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:  # noqa: ARG001  # trains its own
    """See the module."""
    size = len(bench.tasks)
    weights = torch.ones(size, 1, bench.num_layers)
    return trained_together(bench, 1, lambda: weights, recipe, ties=torch.ones(size, size))
