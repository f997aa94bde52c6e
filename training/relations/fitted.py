"""Fusion weights fitted on measured transfer, and what they are worth on a task that was not measured.

w = argmin ||sum_v w_v rank(V_v) - rank(transfer)||^2 over off-diagonal pairs,  w >= 0,  sum w = 1

Transfer is the one view that measures what we want; the others predict it, cheaply, also for tasks that are not
measured yet. `left_out` is the honest number: for each target the weights are fitted without its row and its column,
then its fused row is compared with what was measured.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from training.relations import Matrix
from training.relations.fuse import fuse, off_diagonal, rank_normalise, spearman

_HEAVY = 1e4  # of the row that holds the sum to 1, next to rows of values in [0, 1]


def weights(views: Mapping[str, Matrix], measured: Matrix) -> dict[str, float]:
    """Share of each view, summing to 1."""
    off = off_diagonal(len(measured))
    ranked = np.stack([rank_normalise(view)[off] for view in views.values()], axis=1)
    return dict(zip(views, simplex(ranked, rank_normalise(measured)[off]).tolist(), strict=True))


def simplex(predictors: Matrix, wanted: Matrix) -> Matrix:
    """(V,) the w on the simplex with least ||predictors w - wanted||. predictors: (pairs, V); wanted: (pairs,)."""
    heavy = _HEAVY * max(1.0, float(np.abs(predictors).max(initial=0)))
    rows = np.vstack([predictors, np.full((1, predictors.shape[1]), heavy)])
    found: Matrix = nnls(rows, np.append(wanted, heavy))[0]
    shares: Matrix = found / found.sum()
    return shares


def left_out(views: Mapping[str, Matrix], measured: Matrix) -> float | None:
    """Mean over targets of the Spearman correlation of a row fused by weights that never saw it; None if undefined."""
    found = [_one_left_out(views, measured, target) for target in range(len(measured))] if len(measured) > 3 else []
    defined = [value for value in found if value is not None]
    return float(np.mean(defined)) if defined else None


def _one_left_out(views: Mapping[str, Matrix], measured: Matrix, target: int) -> float | None:
    others = np.arange(len(measured)) != target
    chosen = weights({name: _of(view, others) for name, view in views.items()}, _of(measured, others))
    return spearman(fuse(views, chosen)[target, others], measured[target, others])


def _of(matrix: Matrix, kept: npt.NDArray[np.bool_]) -> Matrix:
    part: Matrix = matrix[np.ix_(kept, kept)]
    return part
