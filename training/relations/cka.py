"""cka: whether two adapters make the same geometry of the same texts.

CKA(X, Y) = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F),  X, Y (n, d) column-centred;   R[i, j] = CKA(X_i, X_j)

X_k are the pooled hidden states of one probe set, a few training texts of every task, under adapter k. Invariant to
rotations and isotropic scaling of the states. Symmetric; a forward of the probe set per adapter.
Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited" (arXiv 1905.00414).
"""

from collections.abc import Sequence

import numpy as np

from adapters_store.adapter import Adapter
from training import step
from training.backbone import LoadedBackbone
from training.export import resident
from training.relations import Matrix


def similarity(states: Sequence[Matrix]) -> Matrix:
    """(K, K) from one (n, d) matrix of hidden states per adapter; row m of all belongs to the same text."""
    centred = [X - X.mean(axis=0) for X in states]
    found = np.array([[_linear(X, Y) for Y in centred] for X in centred])
    np.fill_diagonal(found, 1)
    return found


def linear(X: Matrix, Y: Matrix) -> float:
    """CKA of (n, d) and (n, d'); 0 if one is constant."""
    return _linear(X - X.mean(axis=0), Y - Y.mean(axis=0))


def _linear(X: Matrix, Y: Matrix) -> float:
    """Of centred X, Y, through whichever is smaller, d x d' products or n x n Grams."""
    if len(X) < max(X.shape[1], Y.shape[1]):
        K, L = X @ X.T, Y @ Y.T
        both, norms = float(np.sum(K * L)), float(np.linalg.norm(K) * np.linalg.norm(L))
    else:
        both, norms = float(np.sum((Y.T @ X) ** 2)), float(np.linalg.norm(X.T @ X) * np.linalg.norm(Y.T @ Y))
    return min(1.0, both / norms) if norms > 0 else 0.0


def states_under(
    backbone: LoadedBackbone, adapters: Sequence[Adapter], rows: Sequence[Sequence[int]], pooling: str, budget: int
) -> list[Matrix]:
    """Per adapter (rows, d) pooled hidden states of the probe rows. budget: tokens in one forward."""
    found = []
    for adapter in adapters:
        with resident(backbone, adapter) as mix:
            pooled = step.pool(backbone.encoder, rows, pooling, budget, mix)
        found.append(pooled.cpu().double().numpy())
    return found
