"""Weights of modules per task and layer, differentiable: what adapters_store/composition.py computes, in torch.

alpha_tkl = softmax_k(E_tkl / tau + lambda log Pi_tk)   over the modules that Pi_t does not exclude
m_tkl     = 1[alpha_tkl >= theta max_j alpha_tjl]       a relative gate never empties a layer
keep_tkl  = path selection over the layers (adapters_store/paths.py)
g_tkl     = mass_tl alpha m keep / sum_k alpha m keep

In training gate and selection are straight-through: forwards use m keep, gradients those of
sigmoid((alpha - theta max alpha) / tau_g) with tau_g falling from 1 to 0.1 (`anneal`), so that a module that is out can
come back. `top_k` selects as in the server.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters_store import paths
from adapters_store.graph import Knobs


@dataclass(frozen=True, eq=False)
class Allocation:
    """What decides the weights beside the prior. evidence: (T, K, num_layers); log_mass: (T, num_layers)."""

    evidence: Tensor
    log_mass: Tensor
    knobs: Knobs

    @staticmethod
    def neutral(num_tasks: int, num_modules: int, num_layers: int, knobs: Knobs) -> "Allocation":
        """No evidence and mass 1: the prior's own weights."""
        return Allocation(torch.zeros(num_tasks, num_modules, num_layers), torch.zeros(num_tasks, num_layers), knobs)

    def alpha(self, Pi: Tensor) -> Tensor:
        """Prior times likelihood (T, K, num_layers), summing to 1 over modules. Pi: (T, K)."""
        outside = (Pi <= 0)[:, :, None]
        log_prior = torch.where(Pi > 0, Pi, torch.ones((), dtype=Pi.dtype)).log()[:, :, None]
        logits = self.evidence / self.knobs.temperature + self.knobs.strength * log_prior
        return torch.softmax(logits.masked_fill(outside, -math.inf), dim=1)

    def weights(self, Pi: Tensor, S: Tensor | None = None, tau_gate: float | None = None) -> Tensor:
        """G (T, K, num_layers) for prior rows Pi (T, K), summing to the mass at each layer.

        S: (K, K) the modules' own prior rows, for path selection, as the server has them (Pi itself where every module
        is a task's); without them paths know no relations and stay. tau_gate: temperature of the straight-through gate;
        None for the hard gate alone.
        """
        alpha = self.alpha(Pi)
        selects = self.knobs.path != "none" or self.knobs.top_k is not None
        selected = self._selected(alpha, Pi, S) if selects else None
        gated = alpha * gate(alpha, self.knobs.threshold, tau_gate, selected)
        return gated / gated.sum(dim=1, keepdim=True) * self.log_mass.exp()[:, None]

    def _selected(self, alpha: Tensor, Pi: Tensor, S: Tensor | None) -> Tensor:
        """(T, K, num_layers) 1 where a module is among its task's first and stays on a path, else 0; no gradients."""
        chosen = torch.zeros_like(alpha, requires_grad=False)
        between = np.eye(alpha.shape[1]) if S is None else S.detach().cpu().double().clamp(min=0).numpy()
        for t, (one, row) in enumerate(zip(alpha.detach().cpu(), Pi.detach().cpu(), strict=True)):
            at_hand = _at_hand(one, row, self.knobs.top_k).numpy()
            mask = paths.keep(one.double().numpy()[at_hand], between[np.ix_(at_hand, at_hand)], self.knobs)
            chosen[t, at_hand] = torch.from_numpy(mask).to(chosen)
        return chosen


def _at_hand(alpha: Tensor, row: Tensor, top_k: int | None) -> Tensor:
    """Indices of the modules of a prior row (K,), heaviest first by mean of alpha (K, num_layers), at most top_k.

    Order and ties as in the server, which meets the modules by their prior.
    """
    by_prior = row.argsort(descending=True, stable=True)
    inside = by_prior[row[by_prior] > 0]
    return inside[(-alpha[inside].mean(dim=1)).argsort(stable=True)][:top_k]


def gate(alpha: Tensor, threshold: float, tau_gate: float | None = None, selected: Tensor | None = None) -> Tensor:
    """1 where a selected alpha (T, K, num_layers) reaches threshold times its layer's largest, else 0; see the module.

    selected: (T, K, num_layers) 1 or 0; all if not given.
    """
    within = alpha if selected is None else alpha * selected
    margin = alpha - threshold * within.amax(dim=1, keepdim=True)
    hard = (margin >= 0).to(alpha.dtype) * (1 if selected is None else selected)
    if tau_gate is None or (threshold == 0 and selected is None):
        return hard
    soft = torch.sigmoid(margin / tau_gate)
    return hard + soft - soft.detach()


def anneal(step: int, total: int, first: float = 1.0, last: float = 0.1) -> float:
    """The gate's temperature at a step: geometric from first to last."""
    return float(first * (last / first) ** (step / max(1, total - 1)))
