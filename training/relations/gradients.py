"""gradients: whether two tasks pull at shared parameters in the same direction.

R[i, j] = mean over points of training of cos(grad L_i, grad L_j),  by the parameters of a shared trunk adapter

Gradients are of the mean loss of a few training texts per task (trunk.py). Symmetric, negative where tasks conflict; K
backward passes per point. Sources: the conflict measure of PCGrad (Yu et al. 2020, arXiv 2001.06782) and GradVac (Wang
et al. 2021, arXiv 2010.05874).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from training.relations import Matrix
from training.relations.embedding import cosine


def similarity(points: Sequence[Sequence[Tensor]]) -> Matrix:
    """(K, K) from the (P,) gradient of every task at each point."""
    cosines: Matrix = np.mean([cosine(torch.stack(list(of)).cpu().double().numpy()) for of in points], axis=0)
    return cosines
