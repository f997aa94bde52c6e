"""single: every task its own adapter and head, g_t = e_t. Nothing is shared: what composition has to beat."""

from training.baselines.answering import RECIPE, answered, under
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result
from training.suite.modules import one_hot
from training.suite.workbench import Workbench


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:  # noqa: ARG001  # one signature for all
    """See the module."""
    weights = one_hot(len(nodes.adapters), bench.num_layers)
    return answered(bench, nodes.heads, under(bench, nodes, weights), weights)
