"""embedding: how alike the texts of two tasks are to the bare backbone.

m_t = mean over task t's training texts of the frozen pooled hidden state;  c = mean over tasks of m_t
R[i, j] = cos(m_i - c, m_j - c)

Symmetric, needs no adapter, one forward per text. Centring takes out what all texts share, without which all cosines of
a sentence encoder crowd near 1. Source: the similarity of AdapterSoup (Chronopoulou et al. 2023, arXiv 2302.07027).
"""

from collections.abc import Sequence

import numpy as np

from training.relations import Matrix


def similarity(pooled: Sequence[Matrix]) -> Matrix:
    """(K, K) from one (texts, d) matrix of pooled hidden states per task."""
    means = np.stack([states.mean(axis=0) for states in pooled])
    return cosine(means - means.mean(axis=0))


def cosine(vectors: Matrix) -> Matrix:
    """(K, K) cosines of the rows of (K, d)."""
    return from_gram(vectors @ vectors.T)


def from_gram(gram: Matrix) -> Matrix:
    """(K, K) cosines from inner products; 0 where a vector is zero."""
    norms = np.sqrt(np.clip(np.diagonal(gram), 0, None))
    scale = np.where(norms > 0, 1 / np.where(norms > 0, norms, 1), 0)
    cosines = np.clip(gram * scale[:, None] * scale[None, :], -1, 1)
    np.fill_diagonal(cosines, 1)
    return cosines
