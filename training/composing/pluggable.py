"""Ours where adapters were trained apart: composed afterwards from each task's N examples, through the graph alone.

R0 (estimate)  ->  prior row pi_t (adapters_store/prior.py)  ->  weights g_t per layer, summing to 1  ->  times the mass
that keeps the length of an update (mass.py)  ->  the head: a mean of the published heads of related tasks that share a
label, weighted by pi_t, and the task's own, then refitted on the N examples near that mean.

Nothing is learned by gradient that could prefer the task's own adapter for having seen its examples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters_store import composition
from adapters_store.graph import Knobs, RelationGraph
from adapters_store.prior import Prior
from training.composing.mass import norm_preserving
from training.progress import Bar, Quiet
from training.relations import Matrix, weights
from training.suite.heads import HeadTensors
from training.suite.methods import Nodes, refitted
from training.suite.modules import mixes, resident
from training.suite.workbench import Workbench


@dataclass(frozen=True)
class Choices:
    """What can be turned, with the values that the suites use.

    c: how far the walk goes; own_head: share of the task's own head in the mean; l2: how near the head stays to it.
    """

    c: float = 0.95
    epsilon: float = 1e-3
    threshold: float = 0.0
    own_head: float = 0.3
    l2: float = 0.1
    has_mass: bool = True


USUAL = Choices()


def knobs_of(choices: Choices) -> Knobs:
    """As the graph has them."""
    return Knobs(c=choices.c, epsilon=choices.epsilon, threshold=choices.threshold)


def prior_rows(tasks: Sequence[str], relations: Matrix, knobs: Knobs) -> Tensor:
    """Pi (T, T) float64: row t over the modules of all tasks, by the store's own arithmetic."""
    edges = {
        (a, b): float(relations[i, j]) for i, a in enumerate(tasks) for j, b in enumerate(tasks)
        if i != j and relations[i, j] > 0
    }  # fmt: skip
    prior = Prior(RelationGraph.of(dict.fromkeys(tasks), edges, knobs=knobs.model_dump()))
    rows = [[prior.row(task).get(module, 0.0) for module in tasks] for task in tasks]
    return torch.tensor(rows, dtype=torch.float64)


def weights_of(tasks: Sequence[str], rows: Tensor, knobs: Knobs, num_layers: int) -> Tensor:
    """(T, K, num_layers) weights as the server composes them, without evidence."""
    priors = {task: _largest_first(tasks, row.tolist()) for task, row in zip(tasks, rows, strict=True)}
    found = torch.zeros(len(tasks), len(tasks), num_layers)
    for t, task in enumerate(tasks):
        composed = composition.from_prior(priors[task], {}, knobs, num_layers, diffused=priors.__getitem__)
        for module, values in composed.items():
            found[t, tasks.index(module)] = torch.from_numpy(np.asarray(values))
    return found


def _largest_first(tasks: Sequence[str], row: Sequence[float]) -> dict[str, float]:
    """A prior row in the order in which the store has it: what knobs like top_k keep of equal weights depends on it."""
    return {tasks[k]: row[k] for k in sorted(range(len(row)), key=lambda k: -row[k]) if row[k] > 0}


def tied_head(bench: Workbench, heads: Sequence[HeadTensors], row: Tensor, t: int, own: float) -> HeadTensors:
    """Mix own * the task's head + (1 - own) * the row-weighted mean of the heads that share each label."""
    labels = [task.labels for task in bench.tasks]
    mean = [_mean_of(heads, labels, row, label, t) for label in labels[t]]
    weight, bias = (torch.stack([part[which] for part in mean]) for which in (0, 1))
    return own * heads[t][0] + (1 - own) * weight, own * heads[t][1] + (1 - own) * bias


def _mean_of(
    heads: Sequence[HeadTensors], labels: Sequence[tuple[str, ...]], row: Tensor, label: str, t: int
) -> tuple[Tensor, Tensor]:
    having = [j for j, names in enumerate(labels) if label in names and row[j] > 0] or [t]
    shares = row[having] / row[having].sum() if float(row[having].sum()) > 0 else torch.ones(len(having))
    at = [labels[j].index(label) for j in having]
    rows = torch.stack([heads[j][0][y] for j, y in zip(having, at, strict=True)])
    biases = torch.stack([heads[j][1][y] for j, y in zip(having, at, strict=True)])
    return shares.float() @ rows, shares.float() @ biases


@dataclass(frozen=True, eq=False)
class Composed:
    """Weights (T, K, num_layers) and the heads that answer under them."""

    weights: Tensor
    heads: list[HeadTensors]
    facts: Mapping[str, Any]


def compose(
    bench: Workbench, nodes: Nodes, relations: Matrix, choices: Choices = USUAL, knobs: Knobs | None = None,
    shown: Bar | None = None,
) -> Composed:  # fmt: skip
    """Weights and heads of every task from its N examples. knobs: all of the graph's, in place of those in choices."""
    knobs = knobs or knobs_of(choices)
    rows = prior_rows(bench.names, relations, knobs)
    mixed = weights_of(bench.names, rows, knobs, bench.num_layers)
    grams = weights.grams_by_layer(nodes.adapters, bench.tail.encoder.sites)
    mass = norm_preserving(mixed, grams) if choices.has_mass else torch.ones(len(rows), bench.num_layers)
    composed = mixed * mass[:, None]
    heads = list(_heads(bench, nodes, rows, composed, choices, shown or Quiet()))
    return Composed(
        composed, heads, {"mass": [round(float(m), 3) for m in mass.mean(dim=1)], "knobs": knobs.model_dump()}
    )


def _heads(
    bench: Workbench, nodes: Nodes, rows: Tensor, composed: Tensor, choices: Choices, shown: Bar
) -> Iterator[HeadTensors]:
    """Every task's head: the mean of related ones, refitted on its examples under its composition."""
    with resident(bench.tail, [adapter.entries for adapter in nodes.adapters]):
        for t, (texts, mix) in enumerate(zip(bench.train, mixes(composed), strict=True)):
            start = tied_head(bench, nodes.heads, rows[t], t, choices.own_head)
            yield refitted(start, bench.pooled(texts, mix), texts.targets, choices.l2)
            shown.advance(note=bench.names[t])
