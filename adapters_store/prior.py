"""The structural prior: for each task a distribution over modules, diffused over the relation graph.

R (K x K, diagonal 1, negative entries cut to 0) is normalised, diffused and sparsified:
  directed   Rbar = D_out^-1 R;   symmetric  Rbar = D^-1/2 (R + R^T)/2 D^-1/2
  ppr        S = (1 - c)(I - c Rbar)^-1            (Gasteiger et al. 2019, "Diffusion Improves Graph Learning")
  heat       S = exp(-h (I - Rbar))
Row t of S without entries below epsilon, renormalised, is the prior of task t. c = 0 or h = 0 leave each task its own.

Up to DENSE nodes all rows come from one dense solve; beyond, a row is summed as a power series, starting sparse, so
that one row of 10,000 tasks with 50 edges each takes a few milliseconds.
"""

import functools
import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.sparse as sp

from adapters_store.errors import InvalidGraphError
from adapters_store.graph import RelationGraph

DENSE = 512
_TOLERANCE = 1e-5  # mass of the series left out; three orders below the default epsilon
Vector = npt.NDArray[np.float64]


class Prior:
    """Prior rows of one graph. Rows are cached; the object is safe to share between threads."""

    def __init__(self, graph: RelationGraph) -> None:
        self.knobs = graph.knobs
        self.tasks = list(graph.nodes)
        self._index = {task: i for i, task in enumerate(self.tasks)}
        self._walk = _normalised(_relation_matrix(graph, self._index), self.knobs.normalisation)
        self.row = functools.lru_cache(maxsize=4096)(self._row)

    def _row(self, task: str) -> dict[str, float]:
        """Module -> prior weight of a task, largest first; sums to 1. KeyError for a task outside the graph."""
        index = self._index[task]
        weights = self._dense[index] if len(self.tasks) <= DENSE else self._series(index)
        chosen = np.flatnonzero(weights >= max(self.knobs.epsilon, 1e-12))
        order = chosen[np.argsort(-weights[chosen], kind="stable")][: self.knobs.neighbours]
        if not len(order):
            return {task: 1.0}
        total = float(weights[order].sum())
        return {self.tasks[i]: float(weights[i]) / total for i in order.tolist()}

    def row_of(self, relations: Mapping[str, float]) -> dict[str, float]:
        """The row of a task outside the graph, pi_u S, from its weights over tasks in it (normalised here).

        That task has no module of its own: it walks from the tasks it is like. KeyError for one outside the graph;
        InvalidGraphError for weights that are negative, not finite, or all 0.
        """
        total = sum(relations.values())
        if not 0 < total < math.inf or min(relations.values()) < 0:
            raise InvalidGraphError("a task outside the graph needs weights of 0 or more over its tasks, one above 0")
        mixed: dict[str, float] = {}
        for task, weight in relations.items():
            for module, share in self.row(task).items():
                mixed[module] = mixed.get(module, 0.0) + weight / total * share
        return dict(sorted(mixed.items(), key=lambda item: (-item[1], item[0])))

    @functools.cached_property
    def _dense(self) -> Vector:
        """(K, K) Diffused relations, rows summing to 1."""
        walk: Vector = self._walk.toarray()
        identity = np.eye(len(self.tasks))
        if self.knobs.diffusion == "ppr":
            diffused = (1 - self.knobs.c) * np.linalg.inv(identity - self.knobs.c * walk)
        elif self.knobs.diffusion == "heat":
            diffused = scipy.linalg.expm(-self.knobs.h * (identity - walk))
        else:
            diffused = walk
        rows: Vector = diffused / diffused.sum(axis=1, keepdims=True)
        return rows

    def _series(self, index: int) -> Vector:
        """(K,) One row of S as sum_n coefficient_n * e_index Rbar^n."""
        step = np.zeros(len(self.tasks))
        step[index] = 1.0
        total = np.zeros_like(step)
        for coefficient in self._coefficients():
            total += coefficient * step
            step = self._advance(step)
        row: Vector = total / total.sum()
        return row

    def _coefficients(self) -> Iterator[float]:
        """Until what is left of the series is below the tolerance."""
        knobs = self.knobs
        if knobs.diffusion == "none":
            yield from (0.0, 1.0)
            return
        coefficient, left, n = (1 - knobs.c, 1.0, 0) if knobs.diffusion == "ppr" else (math.exp(-knobs.h), 1.0, 0)
        while left > _TOLERANCE:
            yield coefficient
            left -= coefficient
            n += 1
            coefficient *= knobs.c if knobs.diffusion == "ppr" else knobs.h / n
            if coefficient == 0:
                return

    def _advance(self, step: Vector) -> Vector:
        """One step of the walk, step @ Rbar; by the few rows that step touches while they are few."""
        touched = np.flatnonzero(step)
        begin, end = self._walk.indptr[touched], self._walk.indptr[touched + 1]
        counts = end - begin
        if counts.sum() * 5 > self._walk.nnz:
            product: Vector = self._transposed @ step
            return product
        edges = np.repeat(begin - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        weights = np.repeat(step[touched], counts) * self._walk.data[edges]
        moved: Vector = np.bincount(self._walk.indices[edges], weights, minlength=len(step))  # type: ignore[assignment]
        return moved

    @functools.cached_property
    def _transposed(self) -> sp.csr_matrix:
        return self._walk.T.tocsr()


def _relation_matrix(graph: RelationGraph, index: dict[str, int]) -> sp.csr_matrix:
    """R with diagonal 1 and without negative entries."""
    edges = [
        (index[i], index[j], weight) for i, j, weight in graph.network.edges(data="weight") if weight > 0 and i != j
    ]
    size = len(index)
    edges += [(i, i, 1.0) for i in range(size)]
    rows, columns, weights = zip(*edges, strict=True) if edges else ((), (), ())
    return sp.csr_matrix((weights, (rows, columns)), shape=(size, size), dtype=np.float64)


def _normalised(relations: sp.csr_matrix, how: str) -> sp.csr_matrix:
    if how == "directed":
        return (sp.diags(1 / relations.sum(axis=1).A1) @ relations).tocsr()
    both = (relations + relations.T) / 2
    root = sp.diags(1 / np.sqrt(both.sum(axis=1).A1))
    return (root @ both @ root).tocsr()
