"""Path selection: which modules a composition keeps at each depth, as a chain over the layers.

score(path) = sum_d log alpha[k_d, d] + mu sum_d log Q[k_d, k_d+1],   Q = rho I + (1 - rho) S, row-normalised
marginals  p[k, d] = sum over paths through k at depth d of exp(score) / Z, by forward and backward sums; a module stays
           at depth d if p >= theta_path * max_k p[k, d]
viterbi    a module stays at depth d if one of the P best paths goes through it there

S is the diffused relation between the modules at hand: a path stays on its module unless a related one is better. The
sums run over logarithms; a module that alpha has gated out is on no path. A depth is never emptied.
"""

from heapq import nlargest

import numpy as np
import numpy.typing as npt

from adapters_store.graph import Knobs

Array = npt.NDArray[np.float64]
Path = tuple[float, tuple[int, ...]]  # score, module at each depth


def transition(diffused: Array, stay: float) -> Array:
    """Q (k, k) from the diffused relations S (k, k) >= 0 between the modules; rows sum to 1."""
    total = diffused.sum(axis=1, keepdims=True)
    own = np.eye(len(diffused))
    shares = np.divide(diffused, total, out=own.copy(), where=total > 0)
    mixed: Array = stay * own + (1 - stay) * shares
    return mixed


def keep(alpha: Array, diffused: Array, knobs: Knobs) -> npt.NDArray[np.bool_]:
    """(k, layers) True where a module stays. alpha: (k, layers) >= 0 with a positive weight at each layer."""
    with np.errstate(divide="ignore"):
        scores = np.log(alpha)
        edges = knobs.path_strength * np.log(transition(diffused, knobs.stay)) if knobs.path_strength else 0 * diffused
    if knobs.path == "viterbi":
        return on_best_paths(scores, edges, knobs.num_paths)
    if knobs.path == "none":
        return np.ones(alpha.shape, bool)
    likely = marginals(scores, edges)
    kept: npt.NDArray[np.bool_] = likely >= knobs.path_threshold * likely.max(axis=0)
    return kept & (likely > 0) if likely.any() else alpha > 0


def marginals(scores: Array, edges: Array) -> Array:
    """Probabilities (k, layers), columns summing to 1. scores: (k, layers); edges: (k, k), row to column; both logs.

    All zero if no path has a positive weight.
    """
    forward, backward = scores.copy(), np.zeros_like(scores)
    for d in range(1, scores.shape[1]):
        forward[:, d] += _logsumexp(forward[:, d - 1, None] + edges, axis=0)
    for d in range(scores.shape[1] - 2, -1, -1):
        backward[:, d] = _logsumexp(edges + (scores[:, d + 1] + backward[:, d + 1])[None], axis=1)
    joint = forward + backward
    whole = _logsumexp(joint[:, 0], axis=0)
    found: Array = np.exp(joint - whole) if np.isfinite(whole) else np.zeros_like(joint)
    return found


def on_best_paths(scores: Array, edges: Array, num_paths: int) -> npt.NDArray[np.bool_]:
    """(k, layers) True on the best paths (of equal ones, those over earlier modules first)."""
    kept = np.zeros(scores.shape, bool)
    for _, path in best_paths(scores, edges, num_paths):
        kept[list(path), range(scores.shape[1])] = True
    return kept if kept.any() else np.isfinite(scores)


def best_paths(scores: Array, edges: Array, num_paths: int) -> list[Path]:
    """The `num_paths` best (score, path), best first: Viterbi's recursion with as many partial paths per module."""
    partial: list[list[Path]] = [[(float(score), (k,))] for k, score in enumerate(scores[:, 0])]
    for d in range(1, scores.shape[1]):
        partial = [_reaching(k, partial, edges[:, k] + scores[k, d], num_paths) for k in range(len(scores))]
    every = [path for reaching in partial for path in reaching if np.isfinite(path[0])]
    return nlargest(num_paths, every, key=_better)


def _reaching(k: int, partial: list[list[Path]], gain: Array, num_paths: int) -> list[Path]:
    """The best paths to module k one depth on. gain: (k,) what the step from each module adds."""
    longer = [(score + float(gain[j]), (*path, k)) for j, paths in enumerate(partial) for score, path in paths]
    return nlargest(num_paths, longer, key=_better)


def _better(found: Path) -> Path:
    """Higher scores first; of equal ones the path over earlier modules."""
    return found[0], tuple(-k for k in found[1])


def _logsumexp(values: Array, axis: int) -> Array:
    top = np.max(values, axis=axis, keepdims=True)
    shift = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        found: Array = np.log(np.exp(values - shift).sum(axis=axis)) + np.squeeze(shift, axis=axis)
    return found
