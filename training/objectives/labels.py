"""labels: a task that classifies. A head reads the pooled hidden state and gives a logit per label.

loss = -log softmax(W pool(h_1 … h_n) + b)[label];  one target per row

The head belongs to the task and is trained along with its adapter.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters_store.encoder import Encoder
from adapters_store.manifest import GoldenExample, HeadSpec
from adapters_store.mixing import Mix
from adapters_store.primitives import head as head_primitive
from adapters_store.primitives.head import Head
from training import seeds
from training.backbone import LoadedBackbone
from training.examples import Split, labelled
from training.objectives.base import Answers, Asked, Objective, Pooling, Score, Texts
from training.tasks import Task

NUM_GOLDEN = 3


class Labels(Objective):
    """See the module."""

    accuracy_name = "accuracy"
    headline = "accuracy"

    def __init__(self, backbone: LoadedBackbone, head: Head) -> None:
        """The head is run as it is: its tensors may be in training."""
        limit = backbone.encoder.max_length
        super().__init__(min(head.spec.max_length or limit, limit), head.spec.pooling)
        self._backbone, self._head = backbone, head

    def texts(self, split: Split) -> Texts:
        """Texts longer than max_length are cut at their end. KeyError for a label that the head does not know."""
        index = {label: i for i, label in enumerate(self._head.spec.labels)}
        examples = labelled(split)
        rows = self._backbone.encode([example.text for example in examples], self.max_length)
        return Texts(rows, [index[example.label] for example in examples])

    def counts(self, texts: Texts) -> list[int]:
        """One label each."""
        return [1] * len(texts)

    @staticmethod
    def read(encoder: Encoder, asked: Sequence[Asked]) -> list[Tensor]:
        """(rows, hidden_size) pooled hidden states per task, taken from the texts that have them already."""
        running = [part for part in asked if part.texts.pooled is None]
        rows = [row for part in running for row in part.texts.rows]
        mixes = [part.mix for part in running for _ in part.texts.rows]
        poolings = [part.objective.pooling for part in running for _ in part.texts.rows]
        pooled = encoder.pool(rows, mixes, poolings) if rows else torch.empty(0, encoder.hidden_size)
        pieces = iter(torch.split(pooled, [len(part.texts) for part in running]))
        return [next(pieces) if part.texts.pooled is None else part.texts.pooled for part in asked]

    def answers(self, found: Tensor, texts: Texts) -> Answers:
        """From pooled hidden states (rows, hidden_size)."""
        logits = head_primitive.reference(self._head, found)  # (rows, labels)
        targets = torch.tensor(texts.targets, device=logits.device)
        return Answers(F.cross_entropy(logits, targets, reduction="none"), logits.argmax(dim=-1) == targets)

    def beats(self, score: Score, best: Score) -> bool:
        """A higher accuracy, or the same with a lower loss."""
        return (score.accuracy, -score.loss) > (best.accuracy, -best.loss)

    @torch.no_grad()
    def golden(self, encoder: Encoder, mix: Mix | None, split: Split) -> list[GoldenExample]:
        """The shortest texts with their logits."""
        texts = sorted((example.text for example in labelled(split)), key=lambda text: (len(text), text))[:NUM_GOLDEN]
        logits = self.logits(encoder, mix, texts)
        return [GoldenExample(text=text, logits=tuple(row)) for text, row in zip(texts, logits.tolist(), strict=True)]

    @torch.no_grad()
    def logits(self, encoder: Encoder, mix: Mix | None, texts: Sequence[str]) -> Tensor:
        """(texts, labels) float32 on the CPU, one text per forward."""
        rows = self._backbone.encode(texts, self.max_length)
        pooled = torch.cat([encoder.pool([row], [mix], [self.pooling]) for row in rows])
        return head_primitive.reference(self._head, pooled).cpu()

    def tensors(self) -> Mapping[str, Tensor]:
        """The head's."""
        return self._head.tensors

    @property
    def head(self) -> Head:
        """The head as it is now."""
        return Head(self._head.spec, {name: t.detach().cpu().clone() for name, t in self._head.tensors.items()})

    def describe(self, texts: Texts) -> str:
        """How many labels."""
        return f"{len(self._head.spec.labels)} labels"


def new_head(task: Task, hidden_size: int, pooling: Pooling, max_length: int, seed: int) -> Head:
    """Small random rows, one per label and the same for a label of this name in every task; bias zero."""
    rows = [torch.randn(hidden_size, generator=seeds.generator(seed, "label", label)) for label in task.labels]
    tensors = {"weight": torch.stack(rows) / hidden_size**0.5, "bias": torch.zeros(len(task.labels))}
    spec = HeadSpec(
        labels=task.labels,
        label_texts=dict(task.label_texts),
        pooling=pooling,
        max_length=max_length,
        tensors={name: f"head.{name}" for name in tensors},
    )
    return Head(spec, tensors)
