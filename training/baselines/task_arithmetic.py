"""task_arithmetic: theta = theta_0 + lambda sum_k tau_k, one model and one lambda for all tasks.

tau_k = DW_k at every site. Source: Ilharco et al. 2023 (arXiv 2212.04089), who choose lambda on validation texts among
0.05 … 1; here it is chosen on training texts, from lambdas and from total masses lambda K. lambda = 1 / K is `uniform`.
"""

import torch

from training.baselines.answering import RECIPE, alike, answered, choose, under
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result
from training.suite.workbench import Workbench

LAMBDAS = (0.05, 0.1, 0.2, 0.3, 0.5)
MASSES = (1.0, 2.0, 3.0, 4.0)


def grid(num_modules: int) -> list[float]:
    """Lambdas to try, in order; those within a thousandth of each other once."""
    return sorted({round(value, 3) for value in (*LAMBDAS, *(mass / num_modules for mass in MASSES))})


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:  # noqa: ARG001  # one signature for all
    """See the module."""
    count, size = len(nodes.adapters), len(bench.tasks)
    weights = {value: alike(torch.full((count,), value), size, bench.num_layers) for value in grid(count)}
    pools = {value: under(bench, nodes, found) for value, found in weights.items()}
    best, facts = choose(bench, nodes, pools)
    return answered(bench, nodes.heads, pools[best], weights[best], facts)
