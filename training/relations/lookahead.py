"""lookahead: by what share a step for task j lowers the loss of task i.

Z_{j->i} = 1 - L_i(theta - eta grad L_j) / L_i(theta);   R[i, j] = mean over points of training of Z_{j->i}

theta is a shared trunk adapter (trunk.py) with heads that trained along; heads stay where they are in the step. Losses
and gradients are of the same few training texts per task. Directed, negative where the step hurts; R[i, i] is of the
task's own step. K^2 forwards of a task's probe texts per point. Source: the inter-task affinity of Fifty et al. 2021,
"Efficiently Identifying Task Groupings for Multi-Task Learning" (TAG, arXiv 2109.04617).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from training.objectives import Texts
from training.relations import Matrix
from training.relations.trunk import Trunk

ETA = 0.1  # a plain gradient step of about the length of an AdamW step at trunk.py's learning rate


def affinity(trunk: Trunk, gradients: Sequence[Tensor], probes: Sequence[Texts], eta: float = ETA) -> Matrix:
    """(K, K) R at one point. gradients: (P,) of each task, at this point."""
    before = np.array(trunk.losses(probes))
    columns = []
    for gradient in gradients:
        _move(trunk.shared, gradient, -eta)
        columns.append(1 - np.array(trunk.losses(probes)) / before)
        _move(trunk.shared, gradient, eta)
    return np.stack(columns, axis=1)


@torch.no_grad()
def _move(parameters: Sequence[Tensor], direction: Tensor, by: float) -> None:
    """Add by * direction to the parameters, in place."""
    for tensor, part in zip(parameters, torch.split(direction, [p.numel() for p in parameters]), strict=True):
        tensor += by * part.view_as(tensor)
