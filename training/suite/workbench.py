"""The bench that every method of a suite works on: tasks, their texts read once, and the frozen backbone's tail.

All methods see the same training examples, test texts and backbone; adapters act from one layer on, so that what lies
below is computed once per text (training/tail.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from adapters_store.mixing import Mix
from training.backbone import LoadedBackbone, load
from training.errors import DataError
from training.examples import Split, labelled
from training.step import micro_batches
from training.tail import Tail
from training.tasks import Sampling, Task, read_tasks, sample


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts of one task, ready to run. rows: token ids; targets: (n,) indices of labels; states: see Tail.read."""

    rows: list[list[int]]
    targets: Tensor
    states: list[Tensor | None]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: Sequence[int]) -> "Texts":
        """The texts at these places."""
        rows, states = [self.rows[i] for i in chosen], [self.states[i] for i in chosen]
        return Texts(rows, self.targets[torch.tensor(list(chosen), dtype=torch.int64)], states)


@dataclass(frozen=True)
class Setting:
    """What a bench is made of. examples: of training per task, None for all; test_examples: likewise."""

    data: tuple[Path, ...]
    examples: int | None
    seed: int = 0
    test_examples: int | None = 200
    max_length: int = 96
    first_layer: int = 3
    backbone: str | None = None
    dtype: str = "bfloat16"
    token_budget: int = 6144


@dataclass(frozen=True, eq=False)
class Workbench:
    """Tasks 0 … T - 1 with their texts, and the tail they run through."""

    setting: Setting
    backbone: LoadedBackbone
    tail: Tail
    tasks: list[Task]
    train: list[Texts]
    test: list[Texts]

    @property
    def names(self) -> list[str]:
        """Of the tasks."""
        return [task.name for task in self.tasks]

    @property
    def num_layers(self) -> int:
        """Layers of the backbone, those below the tail included."""
        return self.tail.encoder.num_layers

    @property
    def hidden_size(self) -> int:
        """Width d of pooled hidden states."""
        return self.tail.encoder.hidden_size

    @torch.no_grad()
    def pooled(self, texts: Texts, mix: Mix | None) -> Tensor:
        """(n, d) float32 pooled hidden states of texts under a mix of what is resident."""
        order = sorted(range(len(texts)), key=lambda i: len(texts.rows[i]))
        lengths = [len(texts.rows[i]) for i in order]
        found = torch.empty(len(texts), self.hidden_size)
        for batch in micro_batches(self.tail.encoder, lengths, self.setting.token_budget):
            chosen = [order[n] for n in batch]
            part = texts.take(chosen)
            found[chosen] = self.tail.pool(
                part.rows, part.states, [mix] * len(chosen), self.backbone.default_pooling
            ).cpu()
        return found

    def without(self, left_out: int) -> "Workbench":
        """The bench without one task."""
        kept = [t for t in range(len(self.tasks)) if t != left_out]
        return self.only(kept)

    def only(self, kept: Sequence[int]) -> "Workbench":
        """The bench with these tasks, in this order."""
        train, test = ([part[t] for t in kept] for part in (self.train, self.test))
        return replace(self, tasks=[self.tasks[t] for t in kept], train=train, test=test)


def prepare(setting: Setting, loaded: LoadedBackbone | None = None) -> Workbench:
    """Tasks read, texts encoded and run up to the tail's first layer. Raises DataError, ConfigError."""
    backbone = loaded or load(setting.backbone, setting.dtype)
    tail = Tail(backbone.encoder, setting.first_layer)
    tasks = read_suite(setting)
    train = [texts_of(backbone, tail, setting, task, task.train) for task in tasks]
    test = [texts_of(backbone, tail, setting, task, _tested(task, setting)) for task in tasks]
    return Workbench(setting, backbone, tail, tasks, train, test)


def read_suite(setting: Setting) -> list[Task]:
    """The classifying tasks of all folders.

    A task's examples are all it has: nothing is cut from train for choosing. Raises DataError.
    """
    sampling = Sampling(setting.seed, setting.examples, dev_fraction=0.0, max_dev=0)
    tasks = [task for folder in setting.data for task in read_tasks(folder, sampling)]
    doubled = sorted({task.name for task in tasks if sum(other.name == task.name for other in tasks) > 1})
    if doubled:
        raise DataError(f"two folders of the suite have a task {doubled[0]!r}")
    odd = [task.name for task in tasks if task.generates or not task.test]
    if odd:
        raise DataError(f"task {odd[0]!r}: a suite needs tasks that classify, each with a test.jsonl")
    return tasks


def _tested(task: Task, setting: Setting) -> Split:
    """The test texts: the same for every seed."""
    if setting.test_examples is None or len(task.test) <= setting.test_examples:
        return task.test
    return sample(task.test, setting.test_examples, "suite", task.name, "test")


def texts_of(backbone: LoadedBackbone, tail: Tail, setting: Setting, task: Task, split: Split) -> Texts:
    """A split of a task, encoded and run up to the tail's first layer."""
    rows = backbone.encode([example.text for example in labelled(split)], setting.max_length)
    targets = torch.tensor(task.targets(split), dtype=torch.int64)
    return Texts(rows, targets, tail.read(rows, setting.token_budget))
