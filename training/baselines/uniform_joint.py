"""uniform_joint: as many modules as tasks, trained together under equal weights, g_tk = 1 / K.

One update of K times the rank, shared by all: what a graph adds is measured against this at equal size.
"""

from training.baselines.answering import RECIPE
from training.baselines.together import trained_together
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result
from training.suite.modules import uniform
from training.suite.workbench import Workbench


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:  # noqa: ARG001  # trains its own
    """See the module."""
    size = len(bench.tasks)
    weights = uniform(size, size, bench.num_layers)
    return trained_together(bench, size, lambda: weights, recipe)
