"""A shared trunk: one LoRA adapter trained on all tasks at once, each with a head of its own.

loss = sum over tasks of the mean cross-entropy of the task's batch;  AdamW

Views that ask how tasks pull at the same parameters (lookahead, gradients, task2vec) need parameters that all tasks
share; the nodes' adapters are one task's each. Heads start anew and train along: the nodes' heads were fitted to their
own adapters and would be wrong for this one. The trunk is looked at in a few points of its training, evenly spread.
Texts come from train alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters_store.encoder import Encoder
from adapters_store.kinds import kind
from adapters_store.mixing import Mix
from training import objectives, seeds, step
from training.objectives import Asked, Texts
from training.relations.material import Material
from training.trainable import TrainableAdapter


@dataclass(frozen=True)
class Recipe:
    """How the trunk is trained and looked at. texts: of a task, at most; probe: of a task at a point."""

    epochs: int = 1
    texts: int = 96
    batch_size: int = 8
    probe: int = 24
    points: int = 2
    lr: float = 2e-3
    head_lr: float = 2e-2
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Trunk:
    """adapters: one per task, all with the same parameters, each with its own objective. texts: train, per task."""

    encoder: Encoder
    adapters: list[TrainableAdapter]
    texts: list[Texts]
    token_budget: int

    @property
    def shared(self) -> list[Tensor]:
        """The trunk's own parameters, without heads."""
        heads = self.adapters[0].head_tensors()
        return [tensor for name, tensor in self.adapters[0].tensors().items() if name not in heads]

    def gradient(self, task: int, texts: Texts) -> Tensor:
        """(P,) gradient of the task's mean loss on these texts by the shared parameters; leaves none behind."""
        step.backward(self.encoder, [step.Part(task, self.adapters[task], texts)], self.token_budget)
        found = torch.cat([tensor.grad.flatten() for tensor in self.shared if tensor.grad is not None])
        for tensor in self.adapters[task].tensors().values():
            tensor.grad = None
        return found

    def losses(self, probes: Sequence[Texts]) -> list[float]:
        """Mean loss of each task on its probe texts under the trunk as it is now; the trunk is put once for all."""
        mix = Mix.one_hot(0, self.encoder.num_layers)
        self.encoder.sites.put(0, self.adapters[0].frozen_entries())
        asked = [Asked(one.objective, texts, mix) for one, texts in zip(self.adapters, probes, strict=True)]
        answers = step.ask(self.encoder, asked, self.token_budget)
        self.encoder.sites.drop(0)
        return [step.score_of(one, answer).loss for one, answer in zip(asked, answers, strict=True)]


def begin(material: Material, recipe: Recipe, token_budget: int) -> Trunk:
    """The trunk at its start: nothing changed yet, heads small and random."""
    method = kind("lora")
    adapters: list[TrainableAdapter] = []
    texts: list[Texts] = []
    for task, trained in zip(material.tasks, material.objectives, strict=True):
        objective = objectives.begin(task, material.backbone, trained.max_length, trained.pooling, recipe.seed)
        one = TrainableAdapter(method, method.Config(), material.backbone.encoder.sites, objective, recipe.seed)
        one.parameters = adapters[0].parameters if adapters else one.parameters
        adapters.append(one)
        chosen = seeds.permutation(len(task.train), recipe.seed, "trunk", task.name)[: recipe.texts]
        texts.append(objective.texts(tuple(task.train[i] for i in chosen)))
    return Trunk(material.backbone.encoder, adapters, texts, token_budget)


def walk(trunk: Trunk, recipe: Recipe) -> Iterator[list[Texts]]:
    """Train the trunk; at each point of its training the probe texts of every task to look at it with.

    The last point is the end of the training.
    """
    heads = [tensor for one in trunk.adapters for tensor in one.head_tensors().values()]
    groups = [(trunk.shared, recipe.lr), (heads, recipe.head_lr)]
    optimizer = torch.optim.AdamW([{"params": p, "lr": lr} for p, lr in groups if p], weight_decay=0.0)
    total = num_steps(trunk, recipe)
    stops = [round(total * (n + 1) / recipe.points) for n in range(recipe.points)]
    for done in range(1, total + 1):
        parts = [step.Part(k, one, _batch(trunk, recipe, k, done - 1)) for k, one in enumerate(trunk.adapters)]
        step.backward(trunk.encoder, parts, trunk.token_budget)
        torch.nn.utils.clip_grad_norm_(trunk.shared, len(trunk.adapters) ** 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for n, stop in enumerate(stops):
            if stop == done:
                yield [probe(trunk, recipe, k, n) for k in range(len(trunk.adapters))]


def num_steps(trunk: Trunk, recipe: Recipe) -> int:
    """Steps in which the largest task is seen `epochs` times, and at least one per point."""
    return max(recipe.points, -(-max(len(texts) for texts in trunk.texts) // recipe.batch_size) * recipe.epochs)


def probe(trunk: Trunk, recipe: Recipe, task: int, point: int) -> Texts:
    """Texts of a task to look at the trunk with, others at every point as far as there are any."""
    texts = trunk.texts[task]
    return texts.take(seeds.permutation(len(texts), recipe.seed, "probe", point)[: recipe.probe])


def _batch(trunk: Trunk, recipe: Recipe, task: int, at: int) -> Texts:
    """Batch `at` of the task, which begins anew behind its last text."""
    texts = trunk.texts[task]
    return texts.take([(at * recipe.batch_size + n) % len(texts) for n in range(min(recipe.batch_size, len(texts)))])
