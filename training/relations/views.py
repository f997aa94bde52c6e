"""Every view by its name, and what several of them share: hidden states, measured transfer, a trained trunk.

A view is a function of what is shared to a (K, K) matrix. What it costs is measured; what is shared is measured apart
and computed once, when the first view asks for it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import Tensor

from training import step
from training.config import RelateConfig, ViewName
from training.errors import DataError
from training.objectives import Asked
from training.progress import Bar
from training.relations import Matrix, arrow, cka, embedding, gradients, labels, lookahead, subspace, task2vec, weights
from training.relations import transfer as transfers
from training.relations import trunk as trunks
from training.relations.material import Material
from training.relations.transfer import Transfer

PROBE_TEXTS = 8  # per task, for cka


@dataclass(frozen=True, eq=False)
class Walked:
    """What was seen on the way of a trunk. gradients: per point (P,) of every task; affinities: (K, K) per point."""

    trunk: trunks.Trunk
    gradients: list[list[Tensor]]
    affinities: list[Matrix]


@dataclass(eq=False)
class Shared:
    """What views share. seconds: of each view and of each shared part, without one another."""

    material: Material
    config: RelateConfig
    shown: Bar
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note what the body costs, less what is noted inside it."""
        inside, start = sum(self.seconds.values()), time.perf_counter()
        yield
        spent = time.perf_counter() - start - (sum(self.seconds.values()) - inside)
        self.seconds[name] = self.seconds.get(name, 0.0) + spent

    @property
    def recipe(self) -> trunks.Recipe:
        """How the trunk is trained."""
        return trunks.Recipe(epochs=self.config.trunk_epochs)

    @cached_property
    def walked(self) -> Walked:
        """A trunk trained once for all views that need one; lookahead's losses are taken on the way."""
        with self.timed("trunk"):
            trunk, seen, affinities = trunks.begin(self.material, self.recipe, self.config.token_budget), [], []
            for probes in trunks.walk(trunk, self.recipe):
                seen.append([trunk.gradient(k, texts) for k, texts in enumerate(probes)])
                if "lookahead" in self.config.views:
                    with self.timed("lookahead"):
                        affinities.append(lookahead.affinity(trunk, seen[-1], probes))
        return Walked(trunk, seen, affinities)

    @cached_property
    def transfer(self) -> Transfer:
        """Measured on the first dev examples of every task."""
        material, count = self.material, self.config.transfer_examples
        dev = []
        for task, objective in zip(material.tasks, material.objectives, strict=True):
            if not task.dev:
                raise DataError(
                    f"task {task.name!r} has no dev examples to measure transfer on; try --views embedding,weights"
                )
            dev.append(Asked(objective, objective.texts(task.dev[:count]), None))
        return transfers.measure(
            material.backbone.encoder, material.adapters, dev, self.config.token_budget, self.shown
        )  # fmt: skip


def _lookahead(shared: Shared) -> Matrix:
    mean: Matrix = np.mean(shared.walked.affinities, axis=0)
    return mean


def _gradients(shared: Shared) -> Matrix:
    return gradients.similarity(shared.walked.gradients)


def _task2vec(shared: Shared) -> Matrix:
    trunk, recipe = shared.walked.trunk, shared.recipe
    probes = [trunks.probe(trunk, recipe, k, recipe.points - 1) for k in range(len(trunk.adapters))]
    return task2vec.similarity(np.stack([task2vec.fisher(trunk, k, texts) for k, texts in enumerate(probes)]))


def _transfer(shared: Shared) -> Matrix:
    return shared.transfer.change


def _weights(shared: Shared) -> Matrix:
    return weights.similarity(shared.material.adapters, shared.material.backbone.encoder.sites)


def _arrow(shared: Shared) -> Matrix:
    return arrow.similarity(shared.material.adapters)


def _subspace(shared: Shared) -> Matrix:
    return subspace.similarity(shared.material.adapters)


def _cka(shared: Shared) -> Matrix:
    material, pairs = shared.material, zip(shared.material.tasks, shared.material.objectives, strict=True)
    rows = [row for task, objective in pairs for row in objective.texts(task.train[:PROBE_TEXTS]).rows]
    pooling = material.objectives[0].pooling
    return cka.similarity(
        cka.states_under(material.backbone, material.adapters, rows, pooling, shared.config.token_budget)
    )


def _embedding(shared: Shared) -> Matrix:
    """From the bare backbone's pooled hidden states of train: of texts, or of prompts with their completions."""
    encoder, pooled = shared.material.backbone.encoder, []
    for task, objective in zip(shared.material.tasks, shared.material.objectives, strict=True):
        rows = objective.texts(task.train).rows
        states = step.pool(encoder, rows, objective.pooling, shared.config.token_budget)
        pooled.append(states.cpu().double().numpy())
        shared.shown.advance()
    return embedding.similarity(pooled)


def _labels(shared: Shared) -> Matrix:
    return labels.similarity([task.labels for task in shared.material.tasks])


VIEWS: dict[ViewName, Callable[[Shared], Matrix]] = {
    "lookahead": _lookahead,
    "gradients": _gradients,
    "task2vec": _task2vec,
    "transfer": _transfer,
    "weights": _weights,
    "arrow": _arrow,
    "subspace": _subspace,
    "cka": _cka,
    "embedding": _embedding,
    "labels": _labels,
}
TOLD = ("embedding", "transfer")  # views that advance the bar by one per task


def measure(shared: Shared) -> dict[str, Matrix]:
    """The views that the settings ask for, in their order; what they cost is left in shared.seconds."""
    found = {}
    for name in shared.config.views:
        with shared.timed(name):
            found[str(name)] = VIEWS[name](shared)
        shared.shown.advance(0 if name in TOLD else len(shared.material.tasks), name)
    return found
