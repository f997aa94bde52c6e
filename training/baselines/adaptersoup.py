"""adaptersoup: the mean of the l adapters whose tasks' texts lie nearest to the target's, its own among them.

g_tk = 1 / l for the l largest cos(m_t - c, m_k - c), else 0; l from {3, 5}, one for the suite.
Source: Chronopoulou et al. 2023 (arXiv 2302.07027), who average parameters of bottleneck adapters; here updates DW are.
"""

import torch
from torch import Tensor

from training.baselines.answering import RECIPE, answered, choose, layered, under
from training.baselines.nearest import similarity
from training.relations import Matrix
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result
from training.suite.workbench import Workbench

SIZES = (3, 5)


def rows(similar: Matrix, size: int) -> Tensor:
    """(T, T) weights of the mean of each task's `size` nearest; all of them if there are fewer."""
    scores = torch.from_numpy(similar.copy()).fill_diagonal_(torch.inf)
    nearest = scores.topk(min(size, len(scores)), dim=1).indices
    return torch.zeros(len(scores), len(scores)).scatter_(1, nearest, 1 / nearest.shape[1])


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:  # noqa: ARG001  # one signature for all
    """See the module."""
    similar = similarity(bench)
    weights = {size: layered(rows(similar, size), bench.num_layers) for size in SIZES}
    pools = {size: under(bench, nodes, found) for size, found in weights.items()}
    best, facts = choose(bench, nodes, pools)
    return answered(bench, nodes.heads, pools[best], weights[best], facts)
