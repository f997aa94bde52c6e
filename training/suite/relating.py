"""How the tasks of a bench relate, from their N training examples alone: no text of another split is read.

Before there are adapters, two views can be had: frozen embeddings and label names. With node adapters, their weights
and the measured transfer join in: what adapter j does for task i's examples, which it has not seen.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters_store.adapter import Adapter
from training.relations import Matrix, embedding, labels, weights
from training.suite.heads import HeadTensors, logits
from training.suite.methods import Nodes, pooled_bare
from training.suite.modules import mixes, resident
from training.suite.workbench import Texts, Workbench
from training.tasks import Task

TRANSFER_TEXTS = 64  # of each task, on which transfer is measured


@dataclass(frozen=True, eq=False)
class Views:
    """Views by name, each (T, T) with [i, j] how much j helps i; seconds: what each cost."""

    tasks: list[str]
    matrices: dict[str, Matrix] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, measure: Callable[[], Matrix]) -> None:
        """Measure a view and the time it takes."""
        start = time.perf_counter()
        self.matrices[name] = measure()
        self.seconds[name] = round(time.perf_counter() - start, 3)

    def to_json(self) -> dict[str, Any]:
        """For results files."""
        rounded = {name: np.round(matrix, 5).tolist() for name, matrix in self.matrices.items()}
        return {"tasks": self.tasks, "views": rounded, "seconds": self.seconds}


def of_data(bench: Workbench) -> Views:
    """What can be known without adapters: embedding and labels."""
    return of_texts(bench.tasks, lambda: [pooled.double().numpy() for pooled in pooled_bare(bench, bench.train)])


def of_texts(tasks: Sequence[Task], pooled: Callable[[], Sequence[Matrix]]) -> Views:
    """The same from the tasks' frozen pooled states, (texts, d) each."""
    views = Views([task.name for task in tasks])
    views.add("embedding", lambda: embedding.similarity(pooled()))
    views.add("labels", lambda: labels.similarity([task.labels for task in tasks]))
    return views


def of_nodes(bench: Workbench, nodes: Nodes) -> Views:
    """All views of trained node adapters."""
    views = of_data(bench)
    views.add("weights", lambda: weights.similarity(nodes.adapters, bench.tail.encoder.sites))
    views.add("transfer", lambda: transfer(bench, nodes))
    return views


def estimate(views: Views) -> Matrix:
    """R0 (T, T) in [0, 1] with diagonal 1: the mean of the label overlap and the positive part of the embedding view.

    Both can be had before there is any adapter, and predicted what helps better than the transfer measured on so few
    examples did (mixed suite, 30 examples, one seed: mean accuracy 0.770 by these two, 0.762 by transfer).
    """
    found: Matrix = (views.matrices["labels"] + np.clip(views.matrices["embedding"], 0, 1)) / 2
    np.fill_diagonal(found, 1)
    return found


def oracle(change: Matrix) -> Matrix:
    """R0 from measured transfer: each row over its largest gain by another task, harm cut to 0, diagonal 1."""
    others = change.copy()
    np.fill_diagonal(others, -np.inf)
    found: Matrix = np.clip(change / np.clip(others.max(axis=1, keepdims=True), 1e-3, None), 0, 1)
    np.fill_diagonal(found, 1)
    return found


def renamed(relations: Matrix, seed: int) -> Matrix:
    """The same graph with its nodes renamed at random: every degree and weight stays, what they mean goes."""
    order = np.random.default_rng([seed, 11]).permutation(len(relations))
    return relations[order][:, order]


def transfer(bench: Workbench, nodes: Nodes, texts: int = TRANSFER_TEXTS) -> Matrix:
    """(T, T) change of the mean log-likelihood of task i's examples when adapter j acts, under head i.

    Off the diagonal adapter j has not seen task i's examples. On the diagonal it was trained on them: the value is too
    high there, and nothing but its sign is used.
    """
    return transfer_of(bench, nodes.adapters, nodes.heads, texts)


def transfer_of(
    bench: Workbench, adapters: Sequence[Adapter], heads: Sequence[HeadTensors], texts: int = TRANSFER_TEXTS
) -> Matrix:
    """(T, K) the same for any K adapters: change in nats per example of what adapter k does for task t."""
    few = [part.take(range(min(texts, len(part)))) for part in bench.train]
    bare = pooled_bare(bench, few)
    before = [_likelihood(head, pooled, part) for head, pooled, part in zip(heads, bare, few, strict=True)]
    size = len(adapters)
    change = np.zeros((len(few), size))
    with resident(bench.tail, [adapter.entries for adapter in adapters]):
        alone = mixes(torch.eye(size)[:, :, None].expand(-1, -1, bench.num_layers))
        for t, part in enumerate(few):
            for k in range(size):
                change[t, k] = _likelihood(heads[t], bench.pooled(part, alone[k]), part) - before[t]
    return change


def _likelihood(head: HeadTensors, pooled: Tensor, texts: Texts) -> float:
    """Mean log-likelihood of the labels, in nats."""
    return -float(torch.nn.functional.cross_entropy(logits(head, pooled), texts.targets))
