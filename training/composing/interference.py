"""What modules under one composition do to each other: conflict where they cancel, redundancy where they repeat.

conflict     outputs    PC = 1 - ||sum_k g_k D_k x|| / sum_k g_k ||D_k x||       0: aligned, near 1: cancelling
             signs      sum |minority sign| / sum |all| over entries of g_k DW_k   (TIES, Yadav et al. 2023)
             gradients  mean of max(0, -cos(grad_i, grad_j)), weighted by g_i g_j  (PCGrad, Yu et al. 2020)
redundancy   overlap    sum_{i<j} g_i g_j cos^2(DW_i, DW_j)
             rank       effective rank of sum_k g_k B_k A_k over sum_k r_k
             idle       share of active rank slots with less than 1 % of the output's norm

A (r_k, d_in) and B (d_out, r_k) with the scale in it, g (K,). The effective rank is exp of the entropy of the singular
values as shares (Roy and Vetterli 2007). The update is never formed: with B_cat = Q_B R_B and A_cat^T = Q_A R_A its
singular values are those of R_B R_A^T.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
IDLE = 0.01  # of the output's norm


def cancellation(outputs: npt.ArrayLike, g: npt.ArrayLike) -> float:
    """PC in [0, 1], mean over tokens. outputs: (K, n, d), D_k x of each module alone; tokens without any are left out.

    Weights below 0 count by what they do: the norm of g_k D_k x.
    """
    weighted = np.asarray(outputs, np.float64) * np.asarray(g, np.float64)[:, None, None]
    alone = np.linalg.norm(weighted, axis=2).sum(axis=0)
    together = np.linalg.norm(weighted.sum(axis=0), axis=1)
    some = alone > 0
    return float((1 - together[some] / alone[some]).mean()) if some.any() else 0.0


def sign_conflict(updates: Iterable[npt.ArrayLike], g: npt.ArrayLike) -> float:
    """Share of the mass of g_k DW_k that has the minority's sign, in [0, 1/2]. updates: per site (K, entries)."""
    minority = total = 0.0
    for site in updates:
        weighted = np.asarray(site, np.float64) * np.asarray(g, np.float64)[:, None]
        positive, negative = weighted.clip(min=0).sum(axis=0), -weighted.clip(max=0).sum(axis=0)
        minority += float(np.minimum(positive, negative).sum())
        total += float((positive + negative).sum())
    return minority / total if total else 0.0


def gradient_conflict(gradients: npt.ArrayLike, g: npt.ArrayLike) -> float:
    """Mean of max(0, -cos) over pairs, weighted by g_i g_j; 0 without pairs. gradients: (K, parameters)."""
    given = np.asarray(gradients, np.float64)
    pair = _pairs(g)
    opposed = (-cosines(given @ given.T)).clip(min=0)
    return float((pair * opposed).sum() / pair.sum()) if pair.sum() else 0.0


def overlap(gram: npt.ArrayLike, g: npt.ArrayLike) -> float:
    """Sum over pairs of g_i g_j cos^2(DW_i, DW_j). gram: (K, K) inner products of the updates (losses.update_gram)."""
    return float((_pairs(g) * cosines(np.asarray(gram, np.float64)) ** 2).sum())


def cosines(gram: Array) -> Array:
    """(K, K) cosines of inner products; 0 to what is 0."""
    norms = np.sqrt(gram.diagonal().clip(min=0))
    scale = np.outer(norms, norms)
    return np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)


def rank_use(A: Sequence[npt.ArrayLike], B: Sequence[npt.ArrayLike], g: npt.ArrayLike) -> float:
    """Effective rank of the composed update over its active rank slots, in (0, 1]; 0 if the update is 0."""
    wide, tall = _active(A, B, g)
    values = singular_values(wide, tall)
    shares = values / values.sum() if values.sum() > 0 else values
    kept = shares[shares > 0]
    return float(np.exp(-(kept * np.log(kept)).sum()) / len(wide)) if len(kept) else 0.0


def singular_values(A: Array, B: Array) -> Array:
    """Of B A, largest first, without those that rounding alone makes differ from 0. A: (r, d_in); B: (d_out, r)."""
    if not A.size:
        return np.zeros(0)
    core = np.asarray(np.linalg.qr(B).R @ np.linalg.qr(A.T).R.T, np.float64)
    values = np.asarray(np.linalg.svd(core, compute_uv=False), np.float64)
    return np.where(values > values.max() * 1e-12, values, 0)


def idle_slots(
    A: Sequence[npt.ArrayLike], B: Sequence[npt.ArrayLike], g: npt.ArrayLike, x: npt.ArrayLike, least: float = IDLE
) -> float:
    """Share of active rank slots whose own output is below `least` of the whole output, both as norms over x (n, d_in).

    Slot s gives b_s (a_s . x); its norm over the texts is ||b_s|| sqrt(sum_x (a_s . x)^2).
    """
    wide, tall = _active(A, B, g)
    inner = np.asarray(x, np.float64) @ wide.T  # (n, slots)
    alone = np.linalg.norm(tall, axis=0) * np.linalg.norm(inner, axis=0)
    together = float(np.linalg.norm(inner @ tall.T))
    return float(((alone < least * together) | (alone == 0)).mean()) if len(wide) else 0.0


def _active(A: Sequence[npt.ArrayLike], B: Sequence[npt.ArrayLike], g: npt.ArrayLike) -> tuple[Array, Array]:
    """A_cat (slots, d_in) and B_cat (d_out, slots) with g in it, of the modules with weight."""
    weights = np.asarray(g, np.float64).tolist()
    wide = np.concatenate([np.asarray(a, np.float64)[: None if w else 0] for a, w in zip(A, weights, strict=True)])
    parts = [np.asarray(b, np.float64)[:, : None if w else 0] * w for b, w in zip(B, weights, strict=True)]
    return wide, np.concatenate(parts, axis=1)


def _pairs(g: npt.ArrayLike) -> Array:
    """(K, K) g_i g_j above the diagonal."""
    weights = np.asarray(g, np.float64)
    return np.triu(np.outer(weights, weights), k=1)
