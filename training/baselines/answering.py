"""What all baselines share: how a composition pools texts, how scalars are chosen, how tests are answered.

A **pool** maps one Texts per task to their (n, d) pooled hidden states under some composition. Scalars are chosen once
for a suite, by the mean over tasks of the training cross-entropy under the tasks' own heads, on a few texts of each.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training import seeds
from training.suite.heads import HeadTensors, logits
from training.suite.joint import Extra, Recipe
from training.suite.methods import Nodes, Result, accuracies, pooled_under, refitted
from training.suite.workbench import Texts, Workbench

Pool = Callable[[Sequence[Texts]], list[Tensor]]

RECIPE = Recipe()
NOTHING_MORE = Extra()
SEARCH_TEXTS = 64  # of each task, on which scalars are chosen
REFIT_L2 = 1e-2


def under(bench: Workbench, nodes: Nodes, weights: Tensor) -> Pool:
    """The pool of weights (T, K, num_layers) over the nodes."""
    return lambda split: pooled_under(bench, nodes, weights, split)


def alike(row: Tensor, num_tasks: int, num_layers: int) -> Tensor:
    """(T, K, num_layers) one row of weights (K,) for every task and layer."""
    return row[None, :, None].expand(num_tasks, -1, num_layers).contiguous()


def layered(rows: Tensor, num_layers: int) -> Tensor:
    """(T, K, num_layers) each task's row of weights (T, K) at every layer."""
    return rows[:, :, None].expand(-1, -1, num_layers).contiguous()


def few(bench: Workbench, texts: int = SEARCH_TEXTS) -> list[Texts]:
    """At most so many training texts of each task, the same in every call."""
    orders = [
        seeds.permutation(len(part), bench.setting.seed, name, "few")
        for name, part in zip(bench.names, bench.train, strict=True)
    ]
    return [part.take(sorted(order[:texts])) for order, part in zip(orders, bench.train, strict=True)]


def losses(heads: Sequence[HeadTensors], pooled: Sequence[Tensor], split: Sequence[Texts]) -> Tensor:
    """(T,) mean cross-entropy of each task's texts, in nats."""
    each = [F.cross_entropy(logits(h, p), part.targets) for h, p, part in zip(heads, pooled, split, strict=True)]
    return torch.stack(each).detach()


def choose(bench: Workbench, nodes: Nodes, pools: Mapping[Any, Pool]) -> tuple[Any, dict[str, Any]]:
    """The key whose pool has the least mean training loss, and for the facts: the choice and the whole table."""
    split = few(bench)
    table = {key: float(losses(nodes.heads, pool(split), split).mean()) for key, pool in pools.items()}
    best = min(table, key=lambda key: table[key])
    return best, {"chosen": best, "search": [[key, round(loss, 5)] for key, loss in table.items()]}


def answered(
    bench: Workbench, heads: Sequence[HeadTensors], pool: Pool, weights: Tensor | None = None,
    facts: Mapping[str, Any] = {},
) -> Result:  # fmt: skip
    """Test texts answered by these heads, and beside it by heads refitted on the training texts under the same pool."""
    trained, tested = pool(bench.train), pool(bench.test)
    new = [
        refitted(head, p.detach(), part.targets, REFIT_L2)
        for head, p, part in zip(heads, trained, bench.train, strict=True)
    ]
    more = {"accuracy_refitted": accuracies(new, tested, bench.test)}
    return Result(accuracies(heads, tested, bench.test), weights, dict(facts) | more)
