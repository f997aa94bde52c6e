"""Where one task's training stands: its adapter, its optimiser, its best epoch; and the schedule, as pure functions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from training import seeds
from training.config import FitConfig
from training.objectives import Score, Texts
from training.step import Part
from training.trainable import TrainableAdapter


@dataclass(frozen=True)
class Best:
    """The best epoch so far. tensors: the adapter's values after it."""

    epoch: int
    score: Score
    tensors: Mapping[str, Tensor] = field(repr=False)


@dataclass(eq=False)
class TaskState:
    """One task in training. `step` counts its optimiser steps."""

    name: str
    slot: int
    adapter: TrainableAdapter
    train: Texts
    dev: Texts
    config: FitConfig
    step: int = 0
    best: Best | None = None
    is_stopped: bool = False
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = _optimizer(self.adapter, self.config)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in which every example is seen once."""
        return math.ceil(len(self.train) / self.config.batch_size)

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole training, if nothing stops it early."""
        return self.steps_per_epoch * self.config.epochs

    @property
    def epoch(self) -> int:
        """Epochs behind us."""
        return self.step // self.steps_per_epoch

    @property
    def is_finished(self) -> bool:
        """True if there is nothing left to do."""
        return self.is_stopped or self.step >= self.num_steps

    @property
    def is_at_epoch_end(self) -> bool:
        """True right behind the last step of an epoch."""
        return self.step > 0 and self.step % self.steps_per_epoch == 0

    def next_part(self) -> Part:
        """The task's share of the next step: batch `step` of this epoch's order, which (seed, task, epoch) decide."""
        order = seeds.permutation(len(self.train), self.config.seed, self.name, "epoch", self.epoch)
        start = self.step % self.steps_per_epoch * self.config.batch_size
        return Part(self.slot, self.adapter, self.train.take(order[start : start + self.config.batch_size]))

    def dev_part(self, examples: int | None = None) -> Part:
        """The task's dev split, or its first examples."""
        return Part(self.slot, self.adapter, self.dev.take(range(len(self.dev))[:examples]))

    def advance(self) -> float:
        """Clip the gradient, take the step, forget the gradient; the learning rate of the adapter in it."""
        share = schedule(self.step, self.num_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * share
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return self.config.lr * share

    def dev_metrics(self, score: Score) -> dict[str, float]:
        """A score on the dev split under the names that files have for it."""
        return {f"dev_{name}": value for name, value in self.adapter.objective.metrics(score).items()}

    def judge(self, score: Score) -> None:
        """Keep the values of this epoch if they are the best; stop if patience has run out."""
        if self.best is None or self.adapter.objective.beats(score, self.best.score):
            self.best = Best(self.epoch, score, self.adapter.copy())
        patience = self.config.patience
        self.is_stopped = patience is not None and self.epoch - self.best.epoch >= patience


def schedule(step: int, num_steps: int, config: FitConfig) -> float:
    """Share of the learning rates at a step, counted from 0: a linear rise, then a linear fall to 0 or none."""
    rise = round(config.warmup * num_steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 1.0 if config.schedule == "constant" else (num_steps - step) / max(1, num_steps - rise)


def _optimizer(adapter: TrainableAdapter, config: FitConfig) -> torch.optim.AdamW:
    """AdamW with the head's own learning rate; weight decay on matrices only, since 0 is no neutral gain or norm."""
    heads = adapter.head_tensors()
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, tensor in adapter.tensors().items():
        lr = config.head_lr if name in heads else config.lr
        groups.setdefault((lr, config.weight_decay if tensor.ndim > 1 else 0.0), []).append(tensor)
    return torch.optim.AdamW([
        {"params": tensors, "lr": lr, "base_lr": lr, "weight_decay": decay} for (lr, decay), tensors in groups.items()
    ])  # fmt: skip
