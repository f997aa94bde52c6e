"""Ours where adapters train together: modules, evidence and relations co-trained under the prior, heads tied by it.

R = softplus(R_hat), starting at R0  ->  Pi (prior.py)  ->  g (allocation.py)  ->  every row runs under its task's g
head_t[y] = sum_j H_tj U_j[y],  H = Pi at the start, over the tasks j that have the label y

Sharing is as wide as the walk over R goes, in adapters and in heads alike; evidence E and the modules' own gradients
then say where a task goes its own way. Without adapters yet, R0 comes from frozen embeddings and label names.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters_store.graph import Knobs
from adapters_store.mixing import Mix
from adapters_store.primitives import Entry
from training.composing import losses
from training.composing.allocation import Allocation, anneal
from training.composing.losses import Factors, LossWeights
from training.composing.prior import free, prior, relation
from training.progress import Bar
from training.relations import Matrix
from training.suite.heads import Heads, HeadTensors
from training.suite.joint import USUAL, Extra, History, Recipe, num_steps, train
from training.suite.modules import Modules, mixes
from training.suite.workbench import Workbench

KNOBS = Knobs(c=0.9, epsilon=1e-3, threshold=0.0)
LOSSES = LossWeights()


@dataclass(frozen=True)
class Settings:
    """What can be turned. learns_relations: False keeps R at R0."""

    knobs: Knobs = KNOBS
    losses: LossWeights = LOSSES
    lr: float = 2e-2
    learns_relations: bool = True
    learns_evidence: bool = True
    ties_heads: bool = True


USUAL_SETTINGS = Settings()


class Learned:
    """R_hat and evidence in training, and the weights they give."""

    def __init__(self, relations: Tensor, num_layers: int, settings: Settings) -> None:
        """relations: R0 (K, K) >= 0 with diagonal 1; every module is a task's."""
        size = len(relations)
        self.settings, self.R0 = settings, relations.float()
        self.R_hat = free(self.R0).requires_grad_(settings.learns_relations)
        self.evidence = torch.zeros(size, size, num_layers).requires_grad_(settings.learns_evidence)
        self._connected = self.R0 > 0

    def tensors(self) -> list[Tensor]:
        """What is trained."""
        return [tensor for tensor in (self.R_hat, self.evidence) if tensor.requires_grad]

    @property
    def R(self) -> Tensor:  # noqa: N802  # what the formulas call it
        """The relations now; a pair without an estimated relation keeps none."""
        return torch.where(self._connected, relation(self.R_hat), torch.zeros(())) if len(self.R0) else self.R0

    @property
    def allocation(self) -> Allocation:
        """Evidence as it is now, mass 1."""
        size, _, num_layers = self.evidence.shape
        return Allocation(self.evidence, torch.zeros(size, num_layers), self.settings.knobs)

    def prior(self) -> tuple[Tensor, Tensor]:
        """(Pi, S) of the relations now: one and the same, as every module is a task's."""
        Pi = prior(self.R, self.settings.knobs)
        return Pi, Pi

    def weights(self, tau_gate: float | None = None) -> Tensor:
        """Weights (T, K, num_layers); with tau_gate as in training, else as exported."""
        Pi, S = self.prior()
        return self.allocation.weights(Pi, S, tau_gate)

    def mixes(self, tau_gate: float) -> list[Mix]:
        """What each task runs under in training, without the modules to which the prior gives nothing."""
        Pi, S = self.prior()
        return mixes(self.allocation.weights(Pi, S, tau_gate), Pi > 0)


@dataclass(frozen=True, eq=False)
class CoTrained:
    """The outcome. weights: (T, K, num_layers) as the server will compose them."""

    modules: Modules
    heads: list[HeadTensors]
    learned: Learned
    weights: Tensor
    history: History
    facts: dict[str, Any]


def cotrain(
    bench: Workbench, relations: Matrix, recipe: Recipe = USUAL, settings: Settings = USUAL_SETTINGS,
    shown: Bar | None = None, modules: Modules | None = None,
) -> CoTrained:  # fmt: skip
    """Train one module per task, their evidence and relations, and the heads, from nothing.

    modules: those of another kind than LoRA, at their start.
    """
    learned = Learned(torch.from_numpy(relations), bench.num_layers, settings)
    modules = Modules(bench.tail, len(bench.tasks), bench.setting.seed) if modules is None else modules
    heads = Heads(bench.tasks, bench.hidden_size, bench.setting.seed, _ties(learned) if settings.ties_heads else None)
    total = num_steps(bench, recipe)
    extra = Extra(learned.tensors(), settings.lr, lambda: _penalty(learned, modules))
    history = train(bench, modules, heads, lambda step: learned.mixes(anneal(step, total)), recipe, extra, shown)
    with torch.no_grad():
        weights = learned.weights()
    return CoTrained(modules, heads.frozen(), learned, weights, history, _facts(learned, weights))


def _ties(learned: Learned) -> Tensor:
    """H (T, T): the prior at the start."""
    with torch.no_grad():
        return learned.prior()[0]


def _penalty(learned: Learned, modules: Modules) -> Tensor:
    Pi, _ = learned.prior()
    alpha = learned.allocation.alpha(Pi)
    return losses.penalty(learned.settings.losses, learned.R, learned.R0, alpha, Pi, factors_of(modules))


def factors_of(modules: Modules) -> Factors:
    """Low-rank factors by site, scale in B; sites of other primitives have no factors and are left out."""
    by_site: dict[str, list[Entry]] = {}
    for k in range(len(modules)):
        for entry in modules.entries(k):
            if entry.primitive == "lowrank":
                by_site.setdefault(entry.site, []).append(entry)
    return {
        site: (
            [entry.tensors["A"] for entry in entries],
            [entry.tensors["B"] * float(entry.options.get("scale", 1.0)) for entry in entries],
        )
        for site, entries in by_site.items()
    }


def _facts(learned: Learned, weights: Tensor) -> dict[str, Any]:
    own = torch.stack([weights[t, t] for t in range(len(weights))])
    moved = (learned.R.detach() - learned.R0).abs().max() if len(learned.R0) else torch.zeros(())
    return {
        "own_weight": round(float(own.mean()), 4),
        "largest_evidence": round(float(learned.evidence.detach().abs().max()), 4),
        "relations_moved": round(float(moved), 4),
        "knobs": learned.settings.knobs.model_dump(),
    }
