"""ties: trim, elect sign, merge the agreeing; one model for all tasks.

tau_k <- its largest d % by magnitude, else 0;   gamma = sgn(sum_k tau_k)
DW = lambda * mean of tau_k over {k: sgn(tau_k) = gamma}, entry by entry
Source: Yadav et al. 2023 (arXiv 2306.01708). Trimmed within each site, as PEFT does; the authors trim across the whole
task vector. d from {20, 50} % and lambda are chosen on training texts.
"""

import functools

import torch
from torch import Tensor

from training.baselines.answering import RECIPE
from training.baselines.merging import best_merge
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result
from training.suite.workbench import Workbench

DENSITIES = (0.2, 0.5)
LAMBDAS = (0.5, 1.0, 1.5, 2.0)


def trim(tau: Tensor, density: float) -> Tensor:
    """Each of (K, …) with its int(density * numel) largest entries by magnitude, the others zero."""
    flat = tau.flatten(1)
    kept = flat.abs().topk(int(density * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept)).view_as(tau)


def elect(tau: Tensor) -> Tensor:
    """Mean of (K, …) over those whose sign is that of the sum; a sum of zero counts as positive, as in PEFT."""
    gamma = torch.where(tau.sum(dim=0) >= 0, 1.0, -1.0)
    agreeing = tau.sign() == gamma
    return (tau * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)


def merge(tau: Tensor, site: str, density: float) -> Tensor:  # noqa: ARG001  # as merging.Merge
    """(d_out, d_in) out of (K, d_out, d_in), before lambda."""
    return elect(trim(tau, density))


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:  # noqa: ARG001  # one signature for all
    """See the module."""
    merges = {(density,): functools.partial(merge, density=density) for density in DENSITIES}
    return best_merge(bench, nodes, dict(merges), LAMBDAS, {"keys": ["density", "lambda"]})
