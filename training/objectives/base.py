"""What an objective is: what a task asks of its adapter, from examples to a loss, a score and golden examples.

A row of tokens has one or more targets: a label, or the tokens of a completion. An objective knows its loss and whether
the model is right on each of them; everything else of training is the same whatever a task asks.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adapters_store.encoder import Encoder
from adapters_store.manifest import GenerationSpec, GoldenExample
from adapters_store.mixing import Mix
from adapters_store.primitives.head import Head
from training.examples import Split

Pooling = Literal["mean", "cls", "last", "pooler"]


@dataclass(frozen=True)
class Cuts:
    """What did not fit into max_length. longest: tokens of the longest row as it came."""

    prompts: int = 0
    completions: int = 0
    longest: int = 0


@dataclass(frozen=True)
class Texts:
    """A split made ready to run. rows: token ids.

    targets: of each row the index of its label, or the place where its completion starts.
    cuts: of prompts and completions, where texts are that.
    pooled: (rows, hidden_size) the bare backbone's pooled hidden states, computed once where only a head is trained.
    """

    rows: Sequence[Sequence[int]]
    targets: Sequence[int]
    pooled: Tensor | None = None
    cuts: Cuts | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> "Texts":
        """The texts at these places."""
        pooled = None if self.pooled is None else self.pooled[torch.tensor(indices, device=self.pooled.device)]
        return Texts([self.rows[i] for i in indices], [self.targets[i] for i in indices], pooled)


@dataclass(frozen=True, eq=False)
class Asked:
    """Texts of one task, the objective by which they are judged, and the mix under which they run."""

    objective: "Objective"
    texts: Texts
    mix: Mix | None


@dataclass(frozen=True, eq=False)
class Answers:
    """Per row, summed over its targets. losses: (rows,) cross-entropy in nats; right: (rows,) how many are right."""

    losses: Tensor
    right: Tensor


@dataclass(frozen=True)
class Score:
    """How a task does on a split. accuracy: share of right targets; loss: mean cross-entropy of a target."""

    accuracy: float
    loss: float


class Objective(ABC):
    """A task's objective. max_length: tokens of a row at most; pooling: what stands for a text as a whole."""

    accuracy_name: ClassVar[str]
    headline: ClassVar[str]  # the metric that people look at first

    def __init__(self, max_length: int, pooling: Pooling) -> None:
        self.max_length, self.pooling = max_length, pooling

    @abstractmethod
    def texts(self, split: Split) -> Texts:
        """Examples as rows of tokens with their targets."""

    @abstractmethod
    def counts(self, texts: Texts) -> list[int]:
        """Number of targets of each row."""

    @staticmethod
    @abstractmethod
    def read(encoder: Encoder, asked: Sequence[Asked]) -> list[Tensor]:
        """What `answers` needs of the backbone, for several tasks with this objective in one forward."""

    @abstractmethod
    def answers(self, found: Tensor, texts: Texts) -> Answers:
        """Losses and right answers of this task's texts, from what `read` found for them; differentiable."""

    @abstractmethod
    def beats(self, score: Score, best: Score) -> bool:
        """True if an epoch with this score is better than the best so far."""

    @abstractmethod
    def golden(self, encoder: Encoder, mix: Mix | None, split: Split) -> list[GoldenExample]:
        """A few short examples and what the adapter gives on them, one row per forward."""

    def tensors(self) -> Mapping[str, Tensor]:
        """What is trained beside the adapter's own parameters."""
        return {}

    @property
    def head(self) -> Head | None:
        """The head to publish, detached, on the CPU."""
        return None

    def generation(self, texts: Sequence[Texts]) -> GenerationSpec | None:
        """How a server should ask this task, as these texts suggest; None for one that does not generate."""
        return None

    @abstractmethod
    def describe(self, texts: Texts) -> str:
        """What the answers are, in a few words."""

    def metrics(self, score: Score) -> dict[str, float]:
        """The score under the names that reports use."""
        return {self.accuracy_name: score.accuracy, "loss": score.loss}
