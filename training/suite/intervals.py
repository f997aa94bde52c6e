"""How sure a difference between two methods is: two 95 % intervals over the same (task, seed) pairs.

t:       all pairs taken as independent: mean +- t_{0.975, n-1} s / sqrt(n). Narrow: seeds of one task are alike.
tasks:   tasks drawn anew with all their seeds (cluster bootstrap): says what another choice of tasks would give. Too
         narrow for few tasks: with 3 of them it leaves zero out in 28 % of the cases in which there is no difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Scores = Mapping[tuple[str, int], float]  # (task, seed) -> accuracy
Bounds = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over pairs that both have. t, tasks: intervals, see the module; None with fewer than 2 of them."""

    mean: float
    t: Bounds | None
    tasks: Bounds | None
    pairs: int

    @property
    def is_sure(self) -> bool:
        """True if both intervals leave zero out: the bootstrap alone is too narrow for a handful of tasks."""
        bounds = [one for one in (self.t, self.tasks) if one is not None]
        return len(bounds) == 2 and (all(low > 0 for low, _ in bounds) or all(high < 0 for _, high in bounds))


def difference(a: Scores, b: Scores, level: float = 0.95) -> Difference | None:
    """Of two methods; None if they have no pair in common."""
    common = sorted(set(a) & set(b))
    if not common:
        return None
    values = [a[pair] - b[pair] for pair in common]
    by_task: dict[str, list[float]] = {}
    for (task, _), value in zip(common, values, strict=True):
        by_task.setdefault(task, []).append(value)
    return Difference(float(np.mean(values)), t_interval(values, level), over_tasks(by_task, level), len(values))


def t_interval(values: Sequence[float], level: float = 0.95) -> Bounds | None:
    """Of the mean of independent values; None for fewer than 2."""
    if len(values) < 2:
        return None
    array = np.asarray(values, dtype=np.float64)
    half = float(student.ppf((1 + level) / 2, len(array) - 1)) * float(array.std(ddof=1)) / len(array) ** 0.5
    return float(array.mean()) - half, float(array.mean()) + half


def over_tasks(by_task: Mapping[str, Sequence[float]], level: float = 0.95, draws: int = 2000) -> Bounds | None:
    """Percentiles of the mean over tasks drawn with replacement, each with all its values; None for fewer than 2.

    The same values give the same interval: the draws are seeded.
    """
    if len(by_task) < 2:
        return None
    sums = np.array([np.sum(values) for values in by_task.values()])
    counts = np.array([len(values) for values in by_task.values()])
    chosen = np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))
    means: NDArray[np.float64] = sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(scores: Scores, level: float = 0.95) -> tuple[float, Bounds | None]:
    """Mean accuracy and its interval over seeds' means: how much another seed would move it."""
    by_seed: dict[int, list[float]] = {}
    for (_, seed), value in scores.items():
        by_seed.setdefault(seed, []).append(value)
    means = [float(np.mean(values)) for values in by_seed.values()]
    return float(np.mean(list(scores.values()))), t_interval(means, level)
