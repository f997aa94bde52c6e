"""How good weights over modules are, and how steady a training was. Arrays in, numbers out.

precision    AWP = 1 - 0.5 ||alpha_hat - alpha*||_1 against known weights; against gains by leaving one module out:
             sum_k alpha_k 1[gain_k > 0], precision@k, Spearman(alpha, gain)
width        N_eff = exp(H(g)): how many modules the weights are spread over; rank slots that a token passes
paths        flips: share of adjacent layers whose heaviest module differs
stability    deviation over seeds, loss spikes |dL| > 5 MAD(dL), coefficient of variation of gradient norms

What modules do to each other's outputs is in interference.py.
"""

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

Array = npt.NDArray[np.float64]
SPIKE = 5.0  # median absolute deviations


def shares(weights: npt.ArrayLike) -> Array:
    """Weights (K, ...) >= 0 divided by their sum over modules; where all are 0, all stay 0."""
    given = np.asarray(weights, np.float64)
    total = given.sum(axis=0, keepdims=True)
    found: Array = np.divide(given, total, out=np.zeros_like(given), where=total > 0)
    return found


def weight_precision(found: npt.ArrayLike, true: npt.ArrayLike) -> float:
    """AWP in [0, 1], mean over what follows the modules. found, true: (K, ...), compared as shares."""
    return float((1 - 0.5 * np.abs(shares(found) - shares(true)).sum(axis=0)).mean())


def without(weights: npt.ArrayLike, k: int) -> Array:
    """Weights (K, num_layers) with module k left out, the others scaled to the same sum at each layer.

    A layer where k was alone becomes empty. gain_k is the score of the weights less the score of these.
    """
    given = np.asarray(weights, np.float64)
    rest = given.copy()
    rest[k] = 0
    scaled: Array = shares(rest) * given.sum(axis=0)
    return scaled


def useful_share(alpha: npt.ArrayLike, gain: npt.ArrayLike) -> float:
    """Share of the weight that lies on modules which help: sum_k alpha_k 1[gain_k > 0]. alpha, gain: (K,)."""
    return float(shares(alpha)[np.asarray(gain) > 0].sum())


def precision_at(alpha: npt.ArrayLike, gain: npt.ArrayLike, k: int) -> float:
    """Share of the k heaviest modules that are among the k with the largest gain; earlier ones win ties."""
    heaviest = np.argsort(-np.asarray(alpha), kind="stable")[:k]
    best = np.argsort(-np.asarray(gain), kind="stable")[:k]
    return len(np.intersect1d(heaviest, best)) / len(best)


def rank_agreement(alpha: npt.ArrayLike, gain: npt.ArrayLike) -> float | None:
    """Spearman correlation of weights and gains (K,); None for fewer than 3 modules, or where one is constant."""
    a, b = np.asarray(alpha, np.float64), np.asarray(gain, np.float64)
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)


def effective_modules(weights: npt.ArrayLike) -> float:
    """N_eff = exp(H(g)), from 1 to K; mean over what follows the modules. weights: (K, ...)."""
    g = shares(weights)
    entropy = -(g * np.log(np.where(g > 0, g, 1))).sum(axis=0)
    return float(np.exp(entropy).mean())


def active_slots(weights: npt.ArrayLike, ranks: npt.ArrayLike) -> int:
    """Rank slots that a token passes. weights: (K, num_layers); ranks: (K, num_layers) summed over a layer's sites."""
    return int(np.asarray(ranks)[np.asarray(weights) != 0].sum())


def path_flips(weights: npt.ArrayLike) -> float:
    """Share of adjacent layers whose heaviest module differs. weights: (K, num_layers); 0 for a single layer."""
    heaviest = np.asarray(weights).argmax(axis=0)
    return float((heaviest[1:] != heaviest[:-1]).mean()) if len(heaviest) > 1 else 0.0


def seed_deviation(scores: npt.ArrayLike) -> float:
    """Standard deviation over seeds (n - 1 in the denominator), mean over tasks. scores: (seeds, tasks), 2 or more."""
    return float(np.asarray(scores, np.float64).std(axis=0, ddof=1).mean())


def loss_spikes(losses: npt.ArrayLike, width: float = SPIKE) -> int:
    """Steps whose change of loss exceeds width median absolute deviations of all changes. losses: (steps,)."""
    change = np.diff(np.asarray(losses, np.float64))
    if not len(change):
        return 0
    deviation = np.median(np.abs(change - np.median(change)))
    return int((np.abs(change) > width * deviation).sum())


def norm_variation(norms: npt.ArrayLike) -> float:
    """Coefficient of variation of gradient norms (steps,): standard deviation over mean; 0 if all are 0."""
    given = np.asarray(norms, np.float64)
    return float(given.std() / given.mean()) if given.any() else 0.0
