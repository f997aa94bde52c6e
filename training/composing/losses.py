"""What is added to the tasks' losses while modules, evidence and relations train. Each term is off at weight 0.

beta_R ||R - R0||_F^2 + beta_1 sum_{i != j} |R_ij|                          relations stay near the estimate, and sparse
beta_S sum_l sum_{i<j} Rsym_ij ||DW_il - DW_jl||_F^2                        related modules alike: a graph Laplacian
beta_O sum_l sum_{i<j} (1 - Rsym_ij) ||A_il A_jl^T||_F^2                    unrelated modules read other directions
beta_K sum_t KL(mean_l alpha_t || Pi_t) + beta_H H(alpha) + beta_B CV^2     weights near the prior, sharp, balanced

DW is never formed: inner products come from factor Grams, O(r^2 (m + n)). R is clipped to [0, 1] in beta_S and beta_O.
Sources: O-LoRA (Wang et al. 2023, arXiv 2310.14152) for beta_O; the rest as in the method's text (DESIGN.md).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Factors = Mapping[
    str, tuple[Sequence[Tensor], Sequence[Tensor]]
]  # site -> A (r_k, d_in) and scaled B (d_out, r_k) per k


class LossWeights(BaseModel):
    """Strengths of the terms; 0 switches one off."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    relation: float = Field(1e-2, ge=0, description="beta_R: relations stay near the estimate")
    sparsity: float = Field(1e-4, ge=0, description="beta_1: few relations")
    smoothness: float = Field(1e-4, ge=0, description="beta_S: related modules alike")
    orthogonality: float = Field(1e-3, ge=0, description="beta_O: unrelated modules read other directions")
    prior: float = Field(1e-2, ge=0, description="beta_K: weights stay near the prior")
    entropy: float = Field(0.0, ge=0, description="beta_H: sharp weights")
    balance: float = Field(0.0, ge=0, description="beta_B: no module idle")


def drift(R: Tensor, R0: Tensor) -> Tensor:
    """||R - R0||_F^2."""
    return ((R - R0) ** 2).sum()


def sparsity(R: Tensor) -> Tensor:
    """Sum of |R_ij| off the diagonal."""
    return R.abs().sum() - R.diagonal().abs().sum()


def smoothness(R: Tensor, factors: Factors) -> Tensor:
    """Sum over sites and pairs of Rsym_ij ||DW_i - DW_j||_F^2, from Grams."""
    pair = _pairs(R)
    total = R.new_zeros(())
    for A, B in factors.values():
        gram = update_gram(A, B)
        apart = gram.diagonal()[:, None] + gram.diagonal()[None] - 2 * gram
        total = total + (pair * apart).sum()
    return total


def orthogonality(R: Tensor, factors: Factors) -> Tensor:
    """Sum over sites and pairs of (1 - Rsym_ij) ||A_i A_j^T||_F^2."""
    strangers = torch.triu(1 - symmetric(R), diagonal=1)
    total = R.new_zeros(())
    for A, _ in factors.values():
        total = total + (strangers * _between((torch.cat(list(A)) @ torch.cat(list(A)).mT) ** 2, A)).sum()
    return total


def divergence(alpha: Tensor, Pi: Tensor) -> Tensor:
    """Sum over tasks of KL(mean over layers of alpha_t || Pi_t). alpha: (T, K, num_layers); Pi: (T, K)."""
    mean = alpha.mean(dim=2)
    tiny = torch.finfo(mean.dtype).tiny
    return (mean * (mean.clamp(min=tiny).log() - Pi.clamp(min=tiny).log())).where(mean > 0, 0.0).sum()


def entropy(alpha: Tensor) -> Tensor:
    """Mean over tasks and layers of the entropy of alpha (T, K, num_layers), in nats."""
    return -(alpha * alpha.clamp(min=torch.finfo(alpha.dtype).tiny).log()).sum(dim=1).mean()


def balance(alpha: Tensor) -> Tensor:
    """Squared coefficient of variation of the modules' mean weights."""
    load = alpha.mean(dim=(0, 2))
    return load.var(unbiased=False) / load.mean() ** 2


def penalty(weights: LossWeights, R: Tensor, R0: Tensor, alpha: Tensor, Pi: Tensor, factors: Factors) -> Tensor:
    """All terms that are on, weighted."""
    terms: dict[str, Callable[[], Tensor]] = {
        "relation": lambda: drift(R, R0),
        "sparsity": lambda: sparsity(R),
        "smoothness": lambda: smoothness(R, factors),
        "orthogonality": lambda: orthogonality(R, factors),
        "prior": lambda: divergence(alpha, Pi),
        "entropy": lambda: entropy(alpha),
        "balance": lambda: balance(alpha),
    }
    total = R.new_zeros(())
    for name, term in terms.items():
        strength = getattr(weights, name)
        total = total + strength * term() if strength else total
    return total


def symmetric(R: Tensor) -> Tensor:
    """(R + R^T) / 2 within [0, 1]."""
    return ((R + R.mT) / 2).clamp(0, 1)


def update_gram(A: Sequence[Tensor], B: Sequence[Tensor]) -> Tensor:
    """(K, K) inner products <DW_i, DW_j>_F = tr((B_i^T B_j)(A_j A_i^T))."""
    wide, tall = torch.cat(list(A)), torch.cat(list(B), dim=1)
    return _between((tall.mT @ tall) * (wide @ wide.mT), A)


def _pairs(R: Tensor) -> Tensor:
    return torch.triu(symmetric(R), diagonal=1)


def _between(by_rank: Tensor, A: Sequence[Tensor]) -> Tensor:
    """(K, K) sums over the blocks of a (sum r, sum r) matrix."""
    owner = torch.repeat_interleave(torch.arange(len(A)), torch.tensor([len(one) for one in A]))
    member = torch.nn.functional.one_hot(owner, len(A)).to(by_rank.dtype)
    return member.mT @ by_rank @ member
