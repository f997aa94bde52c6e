"""model_soup: a greedy soup per target.

Adapters in the order of their score alone on the target's examples under its head; the best begins, each next one
joins the mean if the mean improves by it:  S <- S + {k} if score(mean of S + {k}) > score(mean of S)
Source: Wortsman et al. 2022 (arXiv 2203.05482), greedy soup; its score is accuracy on held-out texts, here it is the
training cross-entropy, which has no ties on 30 texts. Means are of updates DW_k.
"""

import torch
from torch import Tensor

from training.baselines.answering import RECIPE, answered, few, layered, losses, under
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result
from training.suite.modules import mixes, resident
from training.suite.workbench import Texts, Workbench

SOUP_TEXTS = 32  # of each task: K (T + 1) forwards over them


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:  # noqa: ARG001  # one signature for all
    """See the module."""
    with resident(bench.tail, [adapter.entries for adapter in nodes.adapters]):
        chosen = soup(bench, nodes, few(bench, SOUP_TEXTS))
    weights = layered(chosen / chosen.sum(dim=1, keepdim=True), bench.num_layers)
    facts = {"sizes": [int(size) for size in chosen.sum(dim=1)]}
    return answered(bench, nodes.heads, under(bench, nodes, weights), weights, facts)


def soup(bench: Workbench, nodes: Nodes, split: list[Texts]) -> Tensor:
    """(T, K) who is in each target's soup, 0 or 1; the nodes must be resident."""
    size, count = len(bench.tasks), len(nodes.adapters)
    alone = [_scores(bench, nodes, split, torch.eye(count)[[k] * size]) for k in range(count)]
    order = torch.stack(alone, dim=1).argsort(dim=1, stable=True)  # (T, K) best first
    chosen = torch.eye(count)[order[:, 0]]
    best = torch.stack(alone, dim=1).gather(1, order[:, :1]).squeeze(1)
    for place in range(1, count):
        tried = chosen + torch.eye(count)[order[:, place]]
        found = _scores(bench, nodes, split, tried)
        better = found < best
        chosen, best = torch.where(better[:, None], tried, chosen), torch.where(better, found, best)
    return chosen


def _scores(bench: Workbench, nodes: Nodes, split: list[Texts], members: Tensor) -> Tensor:
    """(T,) loss of each target under the mean of its members (T, K)."""
    weights = layered(members / members.sum(dim=1, keepdim=True), bench.num_layers)
    pooled = [bench.pooled(texts, mix) for texts, mix in zip(split, mixes(weights), strict=True)]
    return losses(nodes.heads, pooled, split)
