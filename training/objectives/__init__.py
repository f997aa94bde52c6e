"""What tasks ask of adapters: a contract (base.py) and a file per objective."""

from adapters_store.adapter import Adapter
from training.backbone import LoadedBackbone
from training.errors import DataError
from training.objectives.base import Answers, Asked, Cuts, Objective, Pooling, Score, Texts
from training.objectives.completions import Completions
from training.objectives.labels import Labels, new_head
from training.tasks import Task


def begin(task: Task, backbone: LoadedBackbone, max_length: int, pooling: Pooling | None, seed: int) -> Objective:
    """A task's objective at the start of its training. pooling: what a head reads; None for what suits the backbone."""
    if task.generates:
        return Completions(backbone, max_length)
    chosen, limit = pooling or backbone.default_pooling, min(max_length, backbone.encoder.max_length)
    head = new_head(task, backbone.encoder.hidden_size, chosen, limit, seed).to(backbone.encoder.device)
    for tensor in head.tensors.values():
        tensor.requires_grad_()
    return Labels(backbone, head)


def trained(task: Task, adapter: Adapter, backbone: LoadedBackbone, max_length: int | None = None) -> Objective:
    """A task's objective with the head that was trained for it. max_length: of generating tasks; None for no limit.

    Raises DataError if the adapter does not know the task's labels, or classifies where the task wants texts.
    """
    if task.generates:
        if adapter.head is not None:
            raise DataError(f"the adapter of {task.name} classifies, but the task's lines are prompts and completions")
        return Completions(backbone, max_length or backbone.encoder.max_length)
    if adapter.head is None or not set(task.labels) <= set(adapter.head.spec.labels):
        raise DataError(f"the adapter of {task.name} does not know all of its labels: {', '.join(task.labels)}")
    return Labels(backbone, adapter.head.to(backbone.encoder.device))


__all__ = [
    "Answers",
    "Asked",
    "Completions",
    "Cuts",
    "Labels",
    "Objective",
    "Pooling",
    "Score",
    "Texts",
    "begin",
    "trained",
]
