"""What relations are estimated from: the tasks of a run, their adapters, and the backbone."""

from dataclasses import dataclass

from adapters_store.adapter import Adapter
from training.backbone import LoadedBackbone
from training.objectives import Objective
from training.tasks import Task


@dataclass(frozen=True, eq=False)
class Material:
    """One entry per task in each list, in one order. objectives: with the heads that were trained."""

    tasks: list[Task]
    adapters: list[Adapter]
    objectives: list[Objective]
    backbone: LoadedBackbone

    @property
    def names(self) -> list[str]:
        """Of the tasks."""
        return [task.name for task in self.tasks]
