"""head_only: no adapter at all; a new head per task on the bare backbone.

min over (W, b) of mean cross-entropy + 1e-3 (||W||^2 + ||b||^2), on the task's N examples: ridge logistic regression on
frozen features, the linear probe of Alain & Bengio 2016 (arXiv 1610.01644).
"""

import torch

from training.baselines.answering import RECIPE
from training.suite.heads import HeadTensors
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result, accuracies, pooled_bare, refitted
from training.suite.workbench import Workbench

L2 = 1e-3


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:  # noqa: ARG001  # one signature for all
    """See the module."""
    trained, tested = pooled_bare(bench, bench.train), pooled_bare(bench, bench.test)
    heads = [
        refitted(_zero(len(task.labels), bench.hidden_size), pooled, part.targets, L2)
        for task, pooled, part in zip(bench.tasks, trained, bench.train, strict=True)
    ]
    accuracy = accuracies(heads, tested, bench.test)
    return Result(accuracy, facts={"accuracy_refitted": accuracy, "l2": L2})


def _zero(labels: int, hidden_size: int) -> HeadTensors:
    return torch.zeros(labels, hidden_size), torch.zeros(labels)
