"""shared: one adapter for all tasks, trained on all of them at once, with a head per task.

Hard parameter sharing of multi-task learning (Caruana 1997) on low-rank updates: g_t = 1 for the only module.
"""

import torch

from training.baselines.answering import RECIPE
from training.baselines.together import trained_together
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result
from training.suite.workbench import Workbench


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:  # noqa: ARG001  # trains its own
    """See the module."""
    ones = torch.ones(len(bench.tasks), 1, bench.num_layers)
    return trained_together(bench, 1, lambda: ones, recipe)
