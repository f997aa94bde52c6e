"""task2vec: whether two tasks are sensitive to the same parameters of a common probe.

F_t = mean over texts (x, y) of (d log p_t(y | x) / d theta)^2,  elementwise
d(a, b) = 1 - cos(F_a / (F_a + F_b), F_b / (F_a + F_b));   R = 1 - d

theta is the shared trunk adapter at the end of its training, p_t with task t's own head. This is the empirical Fisher:
y is the text's own label (or completion), not a sample from the model, so that tasks that generate need nothing else.
Dividing by the sum makes all parameters count alike, large or small; where both are zero, neither says anything.
Symmetric; a backward pass per text. Source: Achille et al. 2019, "Task2Vec" (arXiv 1902.03545), section 3.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from training.objectives import Texts
from training.relations import Matrix
from training.relations.trunk import Trunk


def similarity(fishers: Matrix) -> Matrix:
    """(K, K) from (K, P) diagonals of Fisher matrices, none of them negative."""
    found = np.array([[_alike(a, b) for b in fishers] for a in fishers])
    np.fill_diagonal(found, 1)
    return found


def _alike(a: Matrix, b: Matrix) -> float:
    """cos(a / (a + b), b / (a + b)); the largest of both scales them first, so that nothing underflows."""
    scale = max(float(a.max(initial=0)), float(b.max(initial=0))) or 1.0
    a, b = a / scale, b / scale
    there = a + b > 0
    p, q = a[there] / (a + b)[there], b[there] / (a + b)[there]
    norms = float(np.linalg.norm(p) * np.linalg.norm(q))
    return min(1.0, float(p @ q) / norms) if norms > 0 else 0.0


def fisher(trunk: Trunk, task: int, texts: Texts) -> Matrix:
    """(P,) F_t of one task on these texts. A text of many targets counts by its mean log-likelihood."""
    squares: Sequence[Tensor] = [trunk.gradient(task, texts.take([n])).square() for n in range(len(texts))]
    mean: Matrix = torch.stack(list(squares)).mean(dim=0).cpu().double().numpy()
    return mean
