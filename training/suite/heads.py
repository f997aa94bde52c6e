"""The tasks' heads, apart or tied along a graph.

logits_t = pooled W_t^T + b_t,   W_t[y] = sum_j H_tj U_j[y] over tasks j that have a label of that name

H (T x T, row-stochastic over those tasks) is the identity for heads of their own, or the structural prior's row cut to
the tasks that share the label. Tasks that name their answers alike say the same thing about the backbone's space: their
heads are related as their adapters are. What a task publishes is W_t, one head of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from training import seeds
from training.tasks import Task

HeadTensors = tuple[Tensor, Tensor]  # weight (labels, d), bias (labels,)


class Heads:
    """Head parts U_j of all tasks, and the ties H by which they become heads."""

    def __init__(self, tasks: Sequence[Task], hidden_size: int, seed: int, ties: Tensor | None = None) -> None:
        """ties: (T, T) >= 0; None leaves each task its own."""
        self.labels = [task.labels for task in tasks]
        self.parts: list[HeadTensors] = [_new(task, hidden_size, seed) for task in tasks]
        self._tied = [_sources(self.labels, t, ties) for t in range(len(tasks))]

    @staticmethod
    def given(tasks: Sequence[Task], heads: Sequence[HeadTensors], *, trained: bool = True) -> "Heads":
        """Heads of their own that start as these are, and stay so unless they are trained."""
        found = Heads(tasks, heads[0][0].shape[1], 0)
        found.parts = [
            (weight.detach().clone().requires_grad_(trained), bias.detach().clone().requires_grad_(trained))
            for weight, bias in heads
        ]
        return found

    def of(self, t: int) -> HeadTensors:
        """(W_t, b_t) of task t; gradients flow to the parts."""
        sources = self._tied[t]
        if sources is None:
            return self.parts[t]
        weight = torch.stack([sum_of(self.parts, label, 0) for label in sources])
        bias = torch.stack([sum_of(self.parts, label, 1) for label in sources])
        return weight, bias

    def frozen(self) -> list[HeadTensors]:
        """All heads as they are now."""
        with torch.no_grad():
            return [
                (weight.detach().clone(), bias.detach().clone())
                for weight, bias in map(self.of, range(len(self.parts)))
            ]

    def tensors(self) -> list[Tensor]:
        """All that is trained."""
        return [tensor for part in self.parts for tensor in part if tensor.requires_grad]


Source = list[tuple[int, int, float]]  # (task, index of its label, share)


def sum_of(parts: Sequence[HeadTensors], sources: Source, which: int) -> Tensor:
    """The weighted sum of one label's rows (which = 0) or biases (which = 1)."""
    rows = torch.stack([parts[j][which][y] for j, y, _ in sources])
    shares = torch.tensor([share for _, _, share in sources])
    found: Tensor = torch.tensordot(shares, rows, dims=1)
    return found


def _sources(labels: Sequence[tuple[str, ...]], t: int, ties: Tensor | None) -> list[Source] | None:
    """Per label of task t, where its row comes from; None if from the task alone."""
    if ties is None:
        return None
    found = []
    for label in labels[t]:
        having = [(j, labels[j].index(label), float(ties[t, j])) for j in range(len(labels)) if label in labels[j]]
        total = sum(share for _, _, share in having)
        own = [(t, labels[t].index(label), 1.0)]
        found.append([(j, y, share / total) for j, y, share in having if share > 0] if total > 0 else own)
    return found


def _new(task: Task, hidden_size: int, seed: int) -> HeadTensors:
    """Small random rows, the same for a label of this name in every task; bias zero."""
    rows = [torch.randn(hidden_size, generator=seeds.generator(seed, "label", label)) for label in task.labels]
    return (torch.stack(rows) / hidden_size**0.5).requires_grad_(), torch.zeros(len(task.labels)).requires_grad_()


def logits(head: HeadTensors, pooled: Tensor) -> Tensor:
    """(n, labels) of pooled hidden states (n, d)."""
    weight, bias = head
    return pooled @ weight.mT + bias


def accuracy(head: HeadTensors, pooled: Tensor, targets: Tensor) -> float:
    """Share of texts whose largest logit is the right one."""
    return float((logits(head, pooled).argmax(dim=-1) == targets).float().mean())
