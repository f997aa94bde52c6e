"""What a method of a suite is: given the bench and the node adapters, it answers every task's test texts.

Pluggable methods get adapters that were trained apart and compose them afterwards, from the tasks' N training examples;
joint ones train their own; sweeps are joint with one setting changed. Each is a function under a name; a method that
only chooses weights says them, so that they can be looked at, exported and served.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.mixing import Mix
from training.suite.heads import HeadTensors, accuracy
from training.suite.modules import mixes, resident
from training.suite.workbench import Texts, Workbench

Regime = Literal["pluggable", "joint", "unknown", "sweep"]


@dataclass(frozen=True, eq=False)
class Nodes:
    """Node adapters, trained apart, one per task, with the heads they were trained with."""

    adapters: Sequence[Adapter]
    heads: Sequence[HeadTensors]


@dataclass(frozen=True, eq=False)
class Result:
    """How a method did. accuracy: per task, on test texts; weights: (T, K, num_layers) if any; facts: for JSON."""

    accuracy: list[float]
    weights: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A method by name. source: whose idea it is."""

    name: str
    regime: Regime
    run: Callable[[Workbench, Nodes], Result]
    source: str = ""


def pooled_under(bench: Workbench, nodes: Nodes, weights: Tensor, split: Sequence[Texts]) -> list[Tensor]:
    """Per task (n, d) pooled hidden states of its texts under its weights over the nodes."""
    with resident(bench.tail, [adapter.entries for adapter in nodes.adapters]):
        return [bench.pooled(texts, mix) for texts, mix in zip(split, mixes(weights), strict=True)]


def pooled_bare(bench: Workbench, split: Sequence[Texts]) -> list[Tensor]:
    """Per task (n, d) pooled hidden states of the bare backbone."""
    nothing: Mix | None = None
    return [bench.pooled(texts, nothing) for texts in split]


def accuracies(heads: Sequence[HeadTensors], pooled: Sequence[Tensor], split: Sequence[Texts]) -> list[float]:
    """Per task the share of right answers."""
    return [accuracy(h, p, texts.targets) for h, p, texts in zip(heads, pooled, split, strict=True)]


def refitted(head: HeadTensors, pooled: Tensor, targets: Tensor, l2: float, steps: int = 60) -> HeadTensors:
    """The head that fits these states best while staying near where it was.

    Minimises mean cross-entropy + l2 (||W - W_0||^2 + ||b - b_0||^2) by L-BFGS; convex, so the start does not matter.
    """
    start = [tensor.detach().clone() for tensor in head]
    trained = [tensor.clone().requires_grad_() for tensor in start]
    optimizer = torch.optim.LBFGS(trained, max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        drift = sum(((now - then) ** 2).sum() for now, then in zip(trained, start, strict=True))
        loss: Tensor = torch.nn.functional.cross_entropy(pooled @ trained[0].mT + trained[1], targets) + l2 * drift
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return trained[0].detach(), trained[1].detach()
