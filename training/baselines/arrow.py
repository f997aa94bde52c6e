"""arrow: every token to the adapters whose main direction it lies along, without any training.

v_k = top right singular vector of B_k A_k at the site;  alpha = softmax over the 4 largest |v_k . x| / temperature
y = W x + sum_k alpha_k s_k B_k A_k x
Source: Ostapenko et al. 2024 (arXiv 2405.11157); PEFT's arrow. v_k comes from the factors: with B = Q_B R_B and
A^T = Q_A R_A by QR, the singular vectors of B A are those of the small R_B R_A^T carried over by Q_A.
"""

import torch
from torch import Tensor

from training.baselines.answering import RECIPE, answered
from training.baselines.tokenwise import At, Gate, Stack, always, stacks
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result
from training.suite.workbench import Workbench

TOP, TEMPERATURE = 4, 1.0


def prototype(A: Tensor, B: Tensor) -> Tensor:
    """(d_in,) the unit vector that B A stretches most. A: (r, d_in), B: (d_out, r)."""
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    _, R_B = torch.linalg.qr(B.double())
    _, _, Vh = torch.linalg.svd(R_B @ R_A.mT)
    found: Tensor = (Q_A @ Vh[0]).float()
    return found


def prototypes(stack: Stack) -> Tensor:
    """(K, d_in) of the adapters at a site; zero for those that are not there."""
    found = torch.zeros(stack.count, stack.A.shape[1])
    for k in sorted(set(stack.owner.tolist())):
        mine = stack.owner == k
        found[k] = prototype(stack.A[mine], stack.B[:, mine])
    return found


def top_softmax(scores: Tensor, top: int) -> Tensor:
    """(n, K) softmax over the `top` largest scores of each row, 0 for the others."""
    best = scores.topk(min(top, scores.shape[1]), dim=1)
    return torch.zeros_like(scores).scatter(1, best.indices, best.values.softmax(dim=1))


def gate_of(stacked: list[Stack], without: int | None = None) -> Gate:
    """The router of all sites. without: an adapter that no token may go to."""
    by_site = {stack.site: prototypes(stack) for stack in stacked}

    def gate(at: At) -> Tensor:
        scores = (at.x.float() @ by_site[at.stack.site].mT).abs() / TEMPERATURE
        if without is not None:
            scores[:, without] = -torch.inf
        return top_softmax(scores, TOP)

    return gate


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:  # noqa: ARG001  # one signature for all
    """See the module."""
    stacked = stacks(bench, nodes.adapters)
    gate = gate_of(stacked)
    return answered(bench, nodes.heads, always(bench, stacked, gate), None, {"top": TOP, "temperature": TEMPERATURE})
