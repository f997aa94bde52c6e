"""transfer: what really happens when task j's adapter reads task i's texts.

change_ij(x) = mean over the targets y of text x of log p_i(y | x; adapter j) - log p_i(y | x; bare backbone)
R[i, j] = mean over task i's dev texts of change_ij(x);   error[i, j] = its standard error

A task that classifies has one target per text, its label, and p_i is task i's own head's. A task that generates has the
tokens of the completion and the end of text, and p is the language model's own: change_ij is by how many nats per token
adapter j makes task i's dev completions likelier than the bare backbone does. Texts, not tokens, are averaged and
counted, because the tokens of one completion are not independent of each other.

Higher is better, 0 is no help, negative values are findings and are kept. Directed; K x K runs over dev texts, which
are neither trained on nor evaluated on. This is Taskonomy's transfer (Zamir et al. 2018) in log-likelihood instead of a
ratio of accuracies: on dev splits of 25 to 100 texts one text moves an accuracy by 1 to 4 points and the ratio's
denominator is often near zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from adapters_store.adapter import Adapter
from adapters_store.encoder import Encoder
from adapters_store.mixing import Mix
from training import step
from training.objectives import Asked
from training.progress import Bar
from training.relations import Matrix


@dataclass(frozen=True, eq=False)
class Transfer:
    """Measured changes. change, error: (K, K) in nats per target; accuracy: (K, K) of task i under adapter j."""

    change: Matrix
    error: Matrix
    accuracy: Matrix

    @property
    def is_negative(self) -> Matrix:
        """(K, K) 1 where the change is below zero by more than two standard errors, off the diagonal."""
        clear = (self.change < -2 * self.error) & ~np.eye(len(self.change), dtype=bool)
        return clear.astype(np.float64)


def measure(
    encoder: Encoder, adapters: Sequence[Adapter], dev: Sequence[Asked], token_budget: int, shown: Bar
) -> Transfer:
    """Run every adapter, and none, over every task's dev texts; rows of all tasks share forwards.

    dev: of each task its objective with its dev texts; their mixes are replaced.
    """
    base, _ = _likelihoods(encoder, dev, None, token_budget)
    size = len(adapters)
    change, error, accuracy = np.zeros((size, size)), np.zeros((size, size)), np.zeros((size, size))
    for j, adapter in enumerate(adapters):
        under, right = _likelihoods(encoder, dev, adapter, token_budget)
        for i in range(size):
            gain = under[i] - base[i]
            change[i, j], error[i, j] = gain.mean(), gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else np.inf
            accuracy[i, j] = right[i]
        shown.advance()
    return Transfer(change, error, accuracy)


def _likelihoods(
    encoder: Encoder, dev: Sequence[Asked], module: Adapter | None, token_budget: int
) -> tuple[list[Matrix], list[float]]:
    """Per task the mean log-likelihood of each dev text's targets, and the accuracy, under one module."""
    mix = None
    if module is not None and module.entries:
        encoder.sites.put(0, module.entries)
        mix = Mix.one_hot(0, encoder.num_layers)
    asked = [replace(one, mix=mix) for one in dev]
    answers = step.ask(encoder, asked, token_budget)
    encoder.sites.drop(0)
    counts = [np.array(one.objective.counts(one.texts)) for one in asked]
    likelihoods: list[Matrix] = [-a.losses.numpy() / count for a, count in zip(answers, counts, strict=True)]
    scores = [step.score_of(one, answer) for one, answer in zip(asked, answers, strict=True)]
    return likelihoods, [score.accuracy for score in scores]
