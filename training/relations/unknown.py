"""The row of a task that has no adapter: which known tasks it is like, told from its texts or its description.

means:  w_k = max(0, cos(m_u - c, m_k - c)),  m = mean of a task's frozen pooled hidden states, c = mean over known m_k
votes:  each text of u gives a vote to the tasks of its nearest known texts by cosine around c; a task's votes are
        divided by its share of all texts, then averaged over the texts of u
pi_u = the largest `neighbours` of w, normalised to sum 1;   prior of u = pi_u S,  S = rows of the known tasks' prior

Nothing is trained: one forward per text, on the bare backbone. `means` is the embedding view, one row of it; `votes`
sees tasks whose texts fall in several clusters, for which a mean is nowhere. With a description in place of texts the
known tasks' descriptions, or their mean texts, stand for m_k. Source: the new task's row of graph diffusion (Gasteiger
et al. 2019) with AdapterSoup's similarity (Chronopoulou et al. 2023, arXiv 2302.07027).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from adapters_store.prior import Prior
from training import step
from training.backbone import LoadedBackbone
from training.objectives import Pooling
from training.relations import Matrix

Vector = npt.NDArray[np.float64]
How = Literal["means", "votes"]


def row_from_states(new: Matrix, known: Sequence[Matrix], neighbours: int = 4, how: How = "means") -> Vector:
    """(K,) pi_u, summing to 1. new: (n, d) pooled states of the task's texts; known: of each known task (n_k, d)."""
    means = np.stack([states.mean(axis=0) for states in known])
    centre = means.mean(axis=0)
    if how == "means":
        weights = np.clip(_unit(new.mean(axis=0) - centre) @ _unit(means - centre).T, 0, None)
    else:
        weights = _votes(new - centre, [states - centre for states in known], neighbours)
    return nearest(weights, neighbours)


def row_from_description(new: Vector, known: Matrix, neighbours: int = 4) -> Vector:
    """(K,) pi_u, summing to 1. new: (d,) of the description; known: (K, d) of descriptions, or of mean texts."""
    return row_from_states(new[None], [one[None] for one in known], neighbours)


def diffuse(row: Vector, prior: Matrix) -> Vector:
    """(K,) pi_u S. prior: (K, K) S, the known tasks' rows."""
    return row @ prior


def prior_matrix(prior: Prior) -> Matrix:
    """(K, K) the rows of a graph's prior, in the order of its tasks."""
    rows = [prior.row(task) for task in prior.tasks]
    return np.array([[row.get(task, 0.0) for task in prior.tasks] for row in rows])


def embed(
    backbone: LoadedBackbone, texts: Sequence[str], max_length: int = 128, pooling: Pooling | None = None,
    token_budget: int = 2048,
) -> Matrix:  # fmt: skip
    """(texts, d) the bare backbone's pooled hidden states."""
    rows = backbone.encode(texts, min(max_length, backbone.encoder.max_length))
    states = step.pool(backbone.encoder, rows, pooling or backbone.default_pooling, token_budget)
    found: Matrix = states.cpu().double().numpy()
    return found


def nearest(weights: Vector, neighbours: int) -> Vector:
    """(K,) the largest `neighbours` weights, normalised; if none is positive, all known tasks alike."""
    if not weights.max(initial=0) > 0:
        return np.full(len(weights), 1 / len(weights))
    kept = np.zeros_like(weights)
    chosen = np.argsort(-weights, kind="stable")[:neighbours]
    kept[chosen] = weights[chosen]
    normalised: Vector = kept / kept.sum()
    return normalised


def _votes(new: Matrix, known: Sequence[Matrix], neighbours: int) -> Vector:
    """(K,) mean over new texts of the votes of each one's nearest known texts, as if all tasks had as many texts."""
    counts = np.array([len(states) for states in known])
    owner = np.repeat(np.arange(len(known)), counts)
    near = np.argsort(-_unit(new) @ _unit(np.concatenate(known)).T, axis=1, kind="stable")[:, :neighbours]
    votes = np.stack([np.bincount(owner[row], minlength=len(known)) for row in near]) * (counts.sum() / counts)
    mean: Vector = (votes / votes.sum(axis=1, keepdims=True)).mean(axis=0)
    return mean


def _unit(vectors: Matrix) -> Matrix:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: Matrix = vectors / np.where(norms > 0, norms, 1)
    return unit
