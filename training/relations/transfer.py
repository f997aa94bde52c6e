"""transfer: what really happens when task j's adapter reads task i's texts.

change_ij(x) = log p_i(y | x; adapter j) - log p_i(y | x; bare backbone), p_i by task i's own head
R[i, j] = mean over task i's dev texts of change_ij(x);   error[i, j] = its standard error

Directed; K x K runs over dev texts, which are neither trained on nor evaluated on. Negative values are findings and are
kept. This is Taskonomy's transfer (Zamir et al. 2018) in log-likelihood instead of a ratio of accuracies: on dev splits
of 25 to 100 texts one text moves an accuracy by 1 to 4 points and the ratio's denominator is often near zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.encoder import Encoder
from adapters_store.mixing import Mix
from adapters_store.primitives import head as head_primitive
from training import step
from training.export import head_of
from training.progress import Bar
from training.relations import Matrix
from training.step import Texts


@dataclass(frozen=True, eq=False)
class Transfer:
    """Measured changes. change, error: (K, K) in nats per text; accuracy: (K, K) of task i under adapter j."""

    change: Matrix
    error: Matrix
    accuracy: Matrix

    @property
    def is_negative(self) -> Matrix:
        """(K, K) 1 where the change is below zero by more than two standard errors, off the diagonal."""
        clear = (self.change < -2 * self.error) & ~np.eye(len(self.change), dtype=bool)
        return clear.astype(np.float64)


def measure(
    encoder: Encoder, adapters: Sequence[Adapter], dev: Sequence[Texts], token_budget: int, shown: Bar
) -> Transfer:
    """Run every adapter, and none, over every task's dev texts; rows of all tasks share forwards."""
    base, _ = _likelihoods(encoder, adapters, dev, None, token_budget)
    size = len(adapters)
    change, error, accuracy = np.zeros((size, size)), np.zeros((size, size)), np.zeros((size, size))
    for j, adapter in enumerate(adapters):
        under, right = _likelihoods(encoder, adapters, dev, adapter, token_budget)
        for i in range(size):
            gain = under[i] - base[i]
            change[i, j], error[i, j] = gain.mean(), gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else np.inf
            accuracy[i, j] = right[i]
        shown.advance()
    return Transfer(change, error, accuracy)


@torch.no_grad()
def _likelihoods(
    encoder: Encoder, adapters: Sequence[Adapter], dev: Sequence[Texts], module: Adapter | None, token_budget: int
) -> tuple[list[Matrix], list[float]]:
    """Per task the log-likelihood of each dev text by the task's own head, and its accuracy, under one module."""
    mix = None
    if module is not None and module.entries:
        encoder.sites.put(0, module.entries)
        mix = Mix.one_hot(0, encoder.num_layers)
    poolings = [head_of(adapter).spec.pooling for adapter, texts in zip(adapters, dev, strict=True) for _ in texts.rows]
    rows = [row for texts in dev for row in texts.rows]
    pooled = step.pool(encoder, rows, [mix] * len(rows), poolings, token_budget)
    encoder.sites.drop(0)
    pieces = torch.split(pooled, [len(texts) for texts in dev])
    found = [_of_task(adapter, piece, texts) for adapter, piece, texts in zip(adapters, pieces, dev, strict=True)]
    return [likelihood for likelihood, _ in found], [accuracy for _, accuracy in found]


def _of_task(adapter: Adapter, pooled: Tensor, texts: Texts) -> tuple[Matrix, float]:
    logits = head_primitive.reference(head_of(adapter).to(pooled.device), pooled).cpu().double()
    targets = torch.tensor(texts.targets)
    likelihood: Matrix = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0].numpy()
    return likelihood, float((logits.argmax(dim=-1) == targets).double().mean())
