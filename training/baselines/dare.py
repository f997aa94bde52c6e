"""dare: drop entries of each update at random, rescale the rest, then merge; one model for all tasks.

tau~_k = m_k * tau_k / (1 - p),  m_k ~ Bernoulli(1 - p) entry by entry;   E[tau~_k] = tau_k
linear: DW = lambda mean_k tau~_k;   ties: DW = lambda * mean over those that agree with the sign of the sum
Source: Yu et al. 2024 (arXiv 2311.03099); dare_linear and dare_ties of PEFT. Form, density 1 - p and lambda are chosen
on training texts; lambda = 1 is the mean. The masks depend on the seed, the site and the density.
"""

import functools

import torch
from torch import Tensor

from training import seeds
from training.baselines.answering import RECIPE
from training.baselines.merging import Merge, best_merge
from training.baselines.ties import elect
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result
from training.suite.workbench import Workbench

DENSITIES = (0.1, 0.5)
LAMBDAS = (1.0, 2.0, 4.0)


def drop(tau: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry kept with probability density and divided by it, else zero."""
    kept = torch.rand(tau.shape, generator=generator) < density
    return tau * kept / density


def merge(tau: Tensor, site: str, form: str, density: float, seed: int) -> Tensor:
    """(d_out, d_in) out of (K, d_out, d_in), before lambda. form: linear or ties."""
    dropped = drop(tau, density, seeds.generator(seed, "dare", site, density))
    return dropped.mean(dim=0) if form == "linear" else elect(dropped)


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:  # noqa: ARG001  # one signature for all
    """See the module."""
    merges: dict[tuple[str, float], Merge] = {
        (form, density): functools.partial(merge, form=form, density=density, seed=bench.setting.seed)
        for form in ("linear", "ties")
        for density in DENSITIES
    }
    return best_merge(bench, nodes, merges, LAMBDAS, {"keys": ["form", "density", "lambda"]})
