"""Views become one relation matrix.

rank(V)[i, j] = (rank of V[i, j] among the off-diagonal values - 1) / (their number - 1), ties sharing their mean rank
R = sum_v w_v rank(V_v),  w on the simplex;  diagonal 1
then R[i, j] = -|change_ij| / max |change| where the measured transfer is clearly negative: the view that measures what
we want overrules the ones that predict it; and of the positive values of a row only the largest `neighbours` stay.

Ranks make views of any scale comparable; ordinal normalisation is Taskonomy's (Zamir et al. 2018).
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata, spearmanr

from training.relations import Matrix
from training.relations.transfer import Transfer


def rank_normalise(view: Matrix) -> Matrix:
    """(K, K) with off-diagonal values spread over [0, 1] by rank, diagonal 1; all equal values become 1/2."""
    off = off_diagonal(len(view))
    values = view[off]
    ranked = np.ones_like(view)
    if values.size and np.ptp(values) == 0:
        ranked[off] = 0.5
    elif values.size:
        ranked[off] = (rankdata(values) - 1) / (values.size - 1)
    return ranked


def shares(names: list[str], given: Mapping[str, float]) -> dict[str, float]:
    """Weights of the views, summing to 1; a view that is not given counts 1."""
    raw = {name: max(0.0, given.get(name, 1.0)) for name in names}
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()} if total else dict.fromkeys(raw, 1 / len(raw))


def fuse(views: Mapping[str, Matrix], weights: Mapping[str, float]) -> Matrix:
    """(K, K) weighted mean of the rank-normalised views, in [0, 1], diagonal 1."""
    relations: Matrix = sum(
        (weights[name] * rank_normalise(view) for name, view in views.items()),
        np.zeros_like(next(iter(views.values()))),
    )
    np.fill_diagonal(relations, 1)
    return relations


def with_negatives(relations: Matrix, transfer: Transfer) -> Matrix:
    """R with clearly negative transfer as negative values, the worst one -1."""
    negative = transfer.is_negative > 0
    worst = float(np.abs(transfer.change[negative]).max(initial=0))
    return np.where(negative, transfer.change / worst, relations) if worst else relations


def strongest(relations: Matrix, neighbours: int | None) -> Matrix:
    """R with only the largest `neighbours` positive values of each row; negative ones and the diagonal stay."""
    if neighbours is None:
        return relations
    kept = relations.copy()
    for i, row in enumerate(kept):
        others = [j for j in np.argsort(-row, kind="stable").tolist() if j != i and row[j] > 0]
        row[others[neighbours:]] = 0
    return kept


def agreement(views: Mapping[str, Matrix], measured: Matrix) -> dict[str, float | None]:
    """Spearman correlation of each view with the measured transfer, off the diagonal; None where one is constant."""
    off = off_diagonal(len(measured))
    return {name: spearman(view[off], measured[off]) for name, view in views.items()}


def spearman(a: Matrix, b: Matrix) -> float | None:
    """Rank correlation of two vectors; None where one is constant or there are fewer than three values."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)


def off_diagonal(size: int) -> npt.NDArray[np.bool_]:
    """(K, K) True off the diagonal."""
    return ~np.eye(size, dtype=bool)
