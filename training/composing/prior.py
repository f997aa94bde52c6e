"""The structural prior as a differentiable function of the relations: what adapters_store/prior.py computes, in torch.

R = softplus(R_hat) off the diagonal, 1 on it
directed   Rbar = D_out^-1 R;   symmetric  Rbar = D^-1/2 (R + R^T)/2 D^-1/2
ppr        S = (1 - c)(I - c Rbar)^-1;   heat  S = exp(-h (I - Rbar));   rows divided by their sum
Pi         rows of S without entries below epsilon, and with the largest `neighbours` at most, renormalised

Gradients reach R_hat through the solve; what sparsification drops has none.
Source: Gasteiger et al. 2019, "Diffusion Improves Graph Learning" (arXiv 1911.05485).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters_store.graph import Knobs

_LEAST = 1e-4  # relations of R0 that are not above 0 start here: softplus has no 0


def relation(R_hat: Tensor) -> Tensor:
    """R (K, K) >= 0 with diagonal 1, from free parameters R_hat (K, K)."""
    off: Tensor = F.softplus(R_hat)
    return off - torch.diag_embed(off.diagonal()) + torch.eye(len(off), dtype=off.dtype)


def free(R0: Tensor) -> Tensor:
    """R_hat whose relation is R0 (K, K); entries below 1e-4 become 1e-4."""
    found: Tensor = torch.log(torch.expm1(R0.double().clamp(min=_LEAST)))
    return found.to(R0.dtype)


def normalised(R: Tensor, how: str) -> Tensor:
    """Rbar (K, K): row-stochastic, or symmetric."""
    if how == "directed":
        return R / R.sum(dim=1, keepdim=True)
    both = (R + R.mT) / 2
    root = both.sum(dim=1).rsqrt()
    return root[:, None] * both * root[None]


def diffused(R: Tensor, knobs: Knobs) -> Tensor:
    """S (K, K), rows summing to 1, of relations R (K, K) >= 0."""
    walk, identity = normalised(R, knobs.normalisation), torch.eye(len(R), dtype=R.dtype)
    if knobs.diffusion == "ppr":
        spread = (1 - knobs.c) * torch.linalg.inv(identity - knobs.c * walk)
    elif knobs.diffusion == "heat":
        spread = torch.matrix_exp(-knobs.h * (identity - walk))
    else:
        spread = walk
    rows_of: Tensor = spread / spread.sum(dim=1, keepdim=True)
    return rows_of


def rows(S: Tensor, knobs: Knobs) -> Tensor:
    """Pi (K, K): sparsified rows of S, summing to 1; a row with nothing left is its own module."""
    kept = S.detach() >= max(knobs.epsilon, 1e-12)
    if knobs.neighbours is not None and knobs.neighbours < S.shape[1]:
        ranked = S.detach().masked_fill(~kept, -math.inf).argsort(dim=1, descending=True, stable=True)
        among = torch.zeros_like(kept).scatter(1, ranked[:, : knobs.neighbours], value=True)
        kept = kept & among
    cut = torch.where(kept, S, torch.zeros((), dtype=S.dtype))
    own = torch.eye(*S.shape, dtype=S.dtype)
    total = cut.sum(dim=1, keepdim=True)
    return torch.where(total > 0, cut / total.clamp(min=1e-30), own)


def prior(R: Tensor, knobs: Knobs) -> Tensor:
    """Pi (K, K) of relations R (K, K)."""
    return rows(diffused(R, knobs), knobs)
