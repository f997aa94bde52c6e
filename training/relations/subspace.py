"""subspace: how much of what one adapter reads of its input the other reads too.

U = orth(A^T), (d_in, r);   R[i, j] = mean over sites of ||U_i^T U_j||_F^2 / min(r_i, r_j)

It is the mean squared cosine of the principal angles between the row spaces of A_i and A_j: 1 if the smaller lies in
the larger, r / d_in expected by chance. A -> M A with invertible M changes nothing, B plays no part. Symmetric, needs
no data. Adapters from one initial A stay near it, so values crowd near 1 and only their order says something.
Source: the Grassmann similarity of Hu et al. 2021 (arXiv 2106.09685, section 7.2); O-LoRA (Wang et al. 2023).
"""

from collections.abc import Sequence

import numpy as np

from adapters_store.adapter import Adapter
from training.relations import Matrix
from training.relations.factors import by_site, mean_over_sites


def similarity(adapters: Sequence[Adapter]) -> Matrix:
    """(K, K) mean overlap over sites, in [0, 1]; 0 for adapters without a common site."""
    bases = [{k: basis(A.numpy()) for k, (A, _) in mine.items()} for mine in by_site(adapters).values()]
    return mean_over_sites(len(adapters), bases, overlap)


def basis(rows: Matrix, rank: int | None = None) -> Matrix:
    """(d, r) orthonormal columns that span the rows of (n, d), or their `rank` leading directions."""
    _, values, directions = np.linalg.svd(rows, full_matrices=False)
    kept = int((values > values.max(initial=0) * max(rows.shape) * np.finfo(np.float64).eps).sum())
    spanning: Matrix = directions[: min(kept, rank or kept)].T
    return spanning


def overlap(U: Matrix, V: Matrix) -> float:
    """||U^T V||_F^2 / min(r, r') of two orthonormal bases; 0 if one is empty."""
    smaller = min(U.shape[1], V.shape[1])
    return min(1.0, float(np.sum((U.T @ V) ** 2)) / smaller) if smaller else 0.0
