"""Compose: evidence and mass learned under a prior, the modules frozen.

g = allocation(Pi, E, mass)  ->  every row runs under its task's g  ->  gradients reach E, the masses and the heads only

The modules may be any number K of adapters, whatever they were trained on; Pi (T x K) says what each task should expect
of them. A task's own adapter has seen the task's examples: give examples that it has not seen, or leave it out of Pi,
else evidence grows for what it remembers (measured on 16 tasks: 0.76 with in-sample evidence, 0.82 by the prior alone).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.graph import Knobs
from adapters_store.primitives import Entry
from training.composing import losses
from training.composing.allocation import Allocation, anneal
from training.composing.cotrain import KNOBS
from training.progress import Bar
from training.suite.heads import Heads, HeadTensors
from training.suite.joint import USUAL, Extra, History, Recipe, num_steps, train
from training.suite.modules import mixes
from training.suite.workbench import Workbench


@dataclass(frozen=True)
class Learning:
    """What is learned and how strongly the prior holds. closeness: weight of KL(alpha || Pi) per task."""

    lr: float = 0.05
    closeness: float = 1e-2
    entropy: float = 0.0
    learns_mass: bool = False


USUAL_LEARNING = Learning()


class Frozen:
    """Adapters as the modules of a training that leaves them as they are."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._entries = [list(adapter.entries) for adapter in adapters]

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self, k: int) -> list[Entry]:
        """Of module k."""
        return self._entries[k]

    def tensors(self) -> list[Tensor]:
        """None: nothing here is trained."""
        return []


@dataclass(frozen=True, eq=False)
class Evidenced:
    """The outcome. weights: (T, K, num_layers) with hard gates, as exported; heads: as trained along."""

    allocation: Allocation
    weights: Tensor
    heads: list[HeadTensors]
    history: History


def learn(
    bench: Workbench, adapters: Sequence[Adapter], heads: Heads, Pi: Tensor, S: Tensor | None = None,
    recipe: Recipe = USUAL, knobs: Knobs = KNOBS, learning: Learning = USUAL_LEARNING, shown: Bar | None = None,
) -> Evidenced:  # fmt: skip
    """Learn evidence (T, K, num_layers) for every task of the bench under prior rows Pi (T, K)."""
    evidence = torch.zeros(*Pi.shape, bench.num_layers, requires_grad=True)
    log_mass = torch.zeros(len(Pi), bench.num_layers, requires_grad=learning.learns_mass)
    allocation = Allocation(evidence, log_mass, knobs)
    total = num_steps(bench, recipe)

    def penalty() -> Tensor:
        alpha = allocation.alpha(Pi)
        return learning.closeness * losses.divergence(alpha, Pi) + learning.entropy * losses.entropy(alpha)

    extra = Extra([tensor for tensor in (evidence, log_mass) if tensor.requires_grad], learning.lr, penalty)
    weigh = lambda step: mixes(allocation.weights(Pi, S, anneal(step, total)), Pi > 0)  # noqa: E731  # one formula
    history = train(bench, Frozen(adapters), heads, weigh, recipe, extra, shown)
    found = Allocation(evidence.detach(), log_mass.detach(), knobs)
    return Evidenced(found, found.weights(Pi, S), heads.frozen(), history)
