"""uniform: the mean of all adapters for every task, g_tk = 1 / K.

The uniform soup of Wortsman et al. 2022 (arXiv 2203.05482) on updates: the mean of DW_k, not of the factors A and B.
"""

from training.baselines.answering import RECIPE, answered, under
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result
from training.suite.modules import uniform
from training.suite.workbench import Workbench


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:  # noqa: ARG001  # one signature for all
    """See the module."""
    weights = uniform(len(bench.tasks), len(nodes.adapters), bench.num_layers)
    return answered(bench, nodes.heads, under(bench, nodes, weights), weights)
