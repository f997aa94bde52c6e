"""Sensitivity sweeps of co-training: one setting changed at a time, all else as in `ours-joint`.

hyper-parameters  routing temperature tau, gating threshold theta, relation regularisation beta_R (the paper's three)
environment       texts per task and step
data              share of training labels replaced at random; share of examples that every other task keeps
The data fraction is the suite's own axis (--examples), the dtype a setting of the suite (--dtype).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from training.composing.cotrain import KNOBS, LOSSES, USUAL_SETTINGS, Settings, cotrain
from training.suite import relating
from training.suite.joint import USUAL, Recipe
from training.suite.methods import Method, Nodes, Result, accuracies
from training.suite.modules import mixes
from training.suite.workbench import Texts, Workbench

TEMPERATURES = (0.1, 0.5, 1.0, 2.0, 5.0)
THRESHOLDS = (0.0, 0.05, 0.2, 0.5, 0.9)
REGULARISATIONS = (0.0, 1e-4, 1e-2, 1e-1, 1.0)
BATCHES = (4, 8, 16, 32)
NOISES = (0.0, 0.1, 0.2, 0.3)
SHARES = (1.0, 0.5, 0.25)


def noisy(bench: Workbench, share: float) -> Workbench:
    """The bench with this share of each task's training labels drawn anew, at random among the task's labels."""
    generator = torch.Generator().manual_seed(bench.setting.seed)

    def changed(texts: Texts, labels: int) -> Texts:
        flipped = torch.rand(len(texts), generator=generator) < share
        drawn = torch.randint(labels, (len(texts),), generator=generator)
        return replace(texts, targets=torch.where(flipped, drawn, texts.targets))

    train = [changed(texts, len(task.labels)) for texts, task in zip(bench.train, bench.tasks, strict=True)]
    return replace(bench, train=train)


def imbalanced(bench: Workbench, share: float) -> Workbench:
    """The bench in which every other task keeps this share of its training texts, at least as many as it has labels."""
    kept = [
        max(len(task.labels), round(share * len(texts))) for texts, task in zip(bench.train, bench.tasks, strict=True)
    ]
    train = [texts.take(range(min(kept[t], len(texts)))) if t % 2 else texts for t, texts in enumerate(bench.train)]
    return replace(bench, train=train)


def _run(
    name: str, value: float, settings: Settings = USUAL_SETTINGS, recipe: Recipe = USUAL,
    change: Callable[[Workbench], Workbench] | None = None,
) -> Method:  # fmt: skip
    def run(bench: Workbench, nodes: Nodes) -> Result:  # noqa: ARG001  # it trains its own
        bench = change(bench) if change else bench
        found = cotrain(bench, relating.estimate(relating.of_data(bench)), recipe, settings)
        with found.modules.resident(frozen=True):
            pooled = [bench.pooled(part, mix) for part, mix in zip(bench.test, mixes(found.weights), strict=True)]
        facts = found.facts | {"sweep": {"name": name, "value": value}}
        return Result(accuracies(found.heads, pooled, bench.test), found.weights, facts)

    return Method(f"ours-joint@{name.replace(' ', '_')}={value:g}", "sweep", run, "sensitivity")


def _knob(name: str, knob: str, value: float) -> Method:
    return _run(name, value, replace(USUAL_SETTINGS, knobs=KNOBS.model_copy(update={knob: value})))


_ALL = (
    *(_knob("routing temperature", "temperature", value) for value in TEMPERATURES),
    *(_knob("gating threshold", "threshold", value) for value in THRESHOLDS),
    *(
        _run(
            "relation regularisation",
            value,
            replace(USUAL_SETTINGS, losses=LOSSES.model_copy(update={"relation": value})),
        )
        for value in REGULARISATIONS
    ),
    *(_run("batch size", value, recipe=replace(USUAL, batch_size=value)) for value in BATCHES),
    *(_run("label noise", value, change=partial(noisy, share=value)) for value in NOISES),
    *(_run("imbalance", value, change=partial(imbalanced, share=value)) for value in SHARES),
)
SWEEPS: dict[str, Method] = {method.name: method for method in _ALL}
