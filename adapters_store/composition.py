"""Which adapters answer a request, with what weight at each layer.

prior:    alpha_kl = softmax_k(E_tkl / tau + lambda * log Pi_tk) over the modules in the task's prior row, then at most
          top_k modules, then path selection (paths.py), then a relative gate (alpha_kl >= theta * max_j alpha_jl),
          renormalised per layer, times the task's mass at the layer (1 unless the graph says otherwise). Without
          evidence E the weights are the prior's own; neither gate nor paths empty a layer.
single:   the task's own adapter. explicit: weights as given, not normalised. none: the bare backbone.
A mixture of tasks is the weighted mean of their compositions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters_store import paths
from adapters_store.errors import InvalidCompositionError
from adapters_store.graph import Knobs

Weights = dict[str, npt.NDArray[np.float32]]  # module -> (num_layers,)


@dataclass(frozen=True)
class Overrides:
    """What a request may change of the graph's knobs; None leaves the graph's own."""

    temperature: float | None = None
    threshold: float | None = None
    top_k: int | None = None

    def over(self, knobs: Knobs) -> Knobs:
        """The knobs with these in their place."""
        return knobs.model_copy(update={k: v for k, v in vars(self).items() if v is not None})


def from_prior(
    row: Mapping[str, float],
    evidence: Mapping[str, Sequence[float]],
    knobs: Knobs,
    num_layers: int,
    mass: Sequence[float] = (),
    diffused: Callable[[str], Mapping[str, float]] | None = None,
) -> Weights:
    """Weights per layer from a task's prior row and its evidence; they sum to the mass at each layer, or to 1.

    diffused: module -> its own prior row, which path selection reads; without it paths know no relations and stay.
    Raises InvalidCompositionError for evidence or mass with another number of layers.
    """
    modules = list(row)
    logits = (
        np.stack([_evidence(evidence, module, num_layers) for module in modules]) / knobs.temperature
    )  # (k, layers)
    logits += knobs.strength * np.log(np.array([row[module] for module in modules]))[:, None]
    alpha = _softmax(logits)
    kept = np.argsort(-alpha.mean(axis=1), kind="stable")[: knobs.top_k]
    modules, alpha = [modules[i] for i in kept.tolist()], alpha[kept]
    if knobs.path != "none":
        alpha = np.where(paths.keep(alpha, _between(modules, diffused), knobs), alpha, 0)
    alpha = np.where(alpha >= knobs.threshold * alpha.max(axis=0), alpha, 0)
    alpha *= _mass(mass, num_layers) / alpha.sum(axis=0)
    return {module: weights.astype(np.float32) for module, weights in zip(modules, alpha, strict=True) if weights.any()}


def _between(modules: Sequence[str], diffused: Callable[[str], Mapping[str, float]] | None) -> npt.NDArray[np.float64]:
    """(k, k) S between these modules."""
    rows = [diffused(module) if diffused else {module: 1.0} for module in modules]
    return np.array([[row.get(module, 0.0) for module in modules] for row in rows])


def _mass(mass: Sequence[float], num_layers: int) -> npt.NDArray[np.float64]:
    if len(mass) not in (0, num_layers):
        raise InvalidCompositionError(f"the graph's mass has {len(mass)} layers, the backbone has {num_layers}")
    return np.asarray(mass, np.float64) if len(mass) else np.ones(num_layers)


def _evidence(evidence: Mapping[str, Sequence[float]], module: str, num_layers: int) -> npt.NDArray[np.float64]:
    values = evidence.get(module)
    if values is None:
        return np.zeros(num_layers)
    if len(values) != num_layers:
        raise InvalidCompositionError(
            f"the graph's evidence for {module} has {len(values)} layers, the backbone has {num_layers}"
        )
    return np.asarray(values, np.float64)


def _softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    raised = np.exp(logits - logits.max(axis=0))
    shares: npt.NDArray[np.float64] = raised / raised.sum(axis=0)
    return shares


def single(module: str, num_layers: int) -> Weights:
    """The task's own adapter alone."""
    return {module: np.ones(num_layers, np.float32)}


def mixture(parts: Sequence[tuple[float, Weights]]) -> Weights:
    """The weighted mean of compositions; shares are normalised to sum to 1. Raises InvalidCompositionError."""
    total = sum(share for share, _ in parts)
    if any(not math.isfinite(share) or share < 0 for share, _ in parts) or not 0 < total < math.inf:
        raise InvalidCompositionError(
            "a mix needs finite shares of 0 or more with a positive sum, for example {'dvd': 0.7, 'video': 0.3}"
        )
    mixed: Weights = {}
    for share, weights in parts:
        for module, values in weights.items():
            scaled = np.float32(share / total) * values
            mixed[module] = mixed[module] + scaled if module in mixed else scaled
    return mixed


def explicit(weights: Mapping[str, float | Sequence[float]], num_layers: int) -> Weights:
    """Weights as a caller gives them: one number, or one per layer. Raises InvalidCompositionError."""
    return {module: _explicit(module, value, num_layers) for module, value in weights.items()}


def _explicit(module: str, value: float | Sequence[float], num_layers: int) -> npt.NDArray[np.float32]:
    values = [float(value)] * num_layers if isinstance(value, int | float) else [float(v) for v in value]
    if len(values) != num_layers:
        raise InvalidCompositionError(f"{module} has weights for {len(values)} layers, the backbone has {num_layers}")
    if not all(math.isfinite(v) and abs(v) <= 1e4 for v in values):
        raise InvalidCompositionError(f"weights of {module} must be finite and at most 1e4 in size")
    return np.array(values, np.float32)


def prune(weights: Weights) -> Weights:
    """Without the modules that have no weight anywhere, largest mean weight first."""
    kept = {module: values for module, values in weights.items() if values.any()}
    return dict(sorted(kept.items(), key=lambda item: (-float(np.abs(item[1]).mean()), item[0])))
