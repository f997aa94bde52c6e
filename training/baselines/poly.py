"""poly: a matrix of which task uses which skill, learned with the skills.

alpha_t = sigmoid(Z_t) / sum_s sigmoid(Z_ts),  Z (T, S) from 0, S = 8 skills;   y = W x + sum_s alpha_ts s_s B_s A_s x
Sources: Ponti et al. 2023 (arXiv 2202.13914), Caccia et al. 2023 (arXiv 2211.03831). Two departures: theirs mixes A and
B apart, which has cross terms, here outputs are mixed exactly; and Z has no Gumbel noise while training. The prior-free
sibling of a relation graph: T x S numbers learned from nothing.
"""

import torch
from torch import Tensor

from training.baselines.answering import RECIPE
from training.baselines.together import trained_together
from training.suite.joint import Extra, Recipe
from training.suite.methods import Nodes, Result
from training.suite.workbench import Workbench

SKILLS, LR = 8, 2e-2


def weights_of(Z: Tensor, num_layers: int) -> Tensor:
    """(T, S, num_layers) of the logits Z (T, S)."""
    used = Z.sigmoid()
    return (used / used.sum(dim=1, keepdim=True))[:, :, None].expand(-1, -1, num_layers)


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:  # noqa: ARG001  # trains its own
    """See the module."""
    Z = torch.zeros(len(bench.tasks), SKILLS, requires_grad=True)
    return trained_together(bench, SKILLS, lambda: weights_of(Z, bench.num_layers), recipe, Extra([Z], LR))
