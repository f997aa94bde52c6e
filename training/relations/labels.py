"""labels: whether two tasks give their answers the same names.

R[i, j] = |L_i & L_j| / |L_i | L_j|,  L_t = names of task t's labels: lower case, `_` and `-` as spaces

The Jaccard index. Symmetric, needs no model and no text. Tasks that generate have no labels and are related to none.
Source: data and label overlap as in AdapterSoup's choice of adapters (Chronopoulou et al. 2023, arXiv 2302.07027).
"""

import re
from collections.abc import Sequence

import numpy as np

from training.relations import Matrix


def similarity(labels: Sequence[Sequence[str]]) -> Matrix:
    """(K, K) from the label names of every task, diagonal 1."""
    names = [{normalised(label) for label in some} for some in labels]
    found = np.array([[_jaccard(a, b) for b in names] for a in names])
    np.fill_diagonal(found, 1)
    return found


def normalised(label: str) -> str:
    """A label name as it is compared."""
    return re.sub(r"[\s_-]+", " ", label).strip().lower()


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0
