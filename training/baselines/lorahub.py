"""lorahub: weights over all adapters, found per target without gradients from a few examples.

min over w in [-1.5, 1.5]^K of cross-entropy(w) + 0.05 mean_k |w_k|,   y = W x + sum_k w_k DW_k x
Source: Huang et al. 2024 (arXiv 2307.13269). Two departures: theirs mixes factors, (sum w B)(sum w A), with cross
terms, here outputs are mixed exactly; and Nevergrad's optimiser is a (1+1) evolution strategy with the 1/5 rule
(Rechenberg 1973), 40 evaluations as theirs, from the better of w = 0 and w = 1/K. All targets evolve side by side.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from training import seeds
from training.baselines.answering import RECIPE, answered, few, layered, losses, under
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result
from training.suite.modules import mixes, resident
from training.suite.workbench import Texts, Workbench

BOUND, PENALTY = 1.5, 0.05
EVALUATIONS, TEXTS = 40, 32
STEP = 0.2  # first standard deviation

Objective = Callable[[Tensor], Tensor]  # (T, K) -> (T,)


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:  # noqa: ARG001  # one signature for all
    """See the module."""
    split = few(bench, TEXTS)
    with resident(bench.tail, [adapter.entries for adapter in nodes.adapters]):
        start = torch.zeros(len(split), len(nodes.adapters))
        found, values = evolve(bench, start, lambda rows: objective(bench, nodes, split, rows), EVALUATIONS)
    weights = layered(found, bench.num_layers)
    facts = {"objective": [round(float(v), 5) for v in values], "evaluations": EVALUATIONS}
    return answered(bench, nodes.heads, under(bench, nodes, weights), weights, facts)


def objective(bench: Workbench, nodes: Nodes, split: list[Texts], rows: Tensor) -> Tensor:
    """(T,) what each target minimises, at its row of weights (T, K); the nodes must be resident."""
    mixed = mixes(layered(rows, bench.num_layers))
    pooled = [bench.pooled(texts, mix) for texts, mix in zip(split, mixed, strict=True)]
    return losses(nodes.heads, pooled, split) + PENALTY * rows.abs().mean(dim=1)


def evolve(bench: Workbench, start: Tensor, score: Objective, evaluations: int) -> tuple[Tensor, Tensor]:
    """The best rows (T, K) and their scores (T,), from `start` or the mean of all, whichever is better."""
    generator = seeds.generator(bench.setting.seed, "lorahub")
    best, value, step = start, score(start), torch.full((len(start), 1), STEP)
    tried = torch.full_like(start, 1 / start.shape[1])
    for _ in range(evaluations - 1):
        found = score(tried)
        better = (found < value)[:, None]
        best, value = torch.where(better, tried, best), torch.minimum(found, value)
        step = step * torch.where(better, 1.5, 1.5**-0.25)  # steady where one in five succeeds
        tried = (best + step * torch.randn(start.shape, generator=generator)).clamp(-BOUND, BOUND)
    return best, value
