"""cotrain: adapters, evidence, relations and heads trained together under the prior (cotrain.py), into run and store.

The path: read_tasks -> relations -> cotrain -> run folder as fit leaves it (cotrained.py) -> versions, graph, aliases
in the store (publish.py). Nothing is written before training is done; a run that could not be published is whole.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters_store.graph import Knobs
from adapters_store.primitives.head import Head
from adapters_store.references import check_alias
from training.composing import benches, cotrained, publish
from training.composing.cotrain import KNOBS, CoTrained, Settings
from training.composing.cotrain import cotrain as train
from training.composing.losses import LossWeights
from training.composing.settings import CotrainConfig
from training.config import validate
from training.errors import ConfigError, RunError
from training.progress import bar, say
from training.relations import Matrix
from training.run import Run
from training.suite import relating
from training.suite.joint import Recipe, num_steps
from training.suite.modules import Modules
from training.suite.workbench import Workbench


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was published. weights: (T, K, num_layers) as the server composes them; accuracy: on dev texts, by task."""

    run: Run
    tasks: list[str]
    version: int
    references: list[str]
    weights: Tensor
    heads: list[Head]
    accuracy: dict[str, float]
    found: CoTrained


def cotrain(config: CotrainConfig) -> Outcome:
    """Train what the settings say and publish it. Raises a TrainingError that says what to do."""
    if config.threads:
        torch.set_num_threads(config.threads)
    settings, run = settings_of(config), _free(config)
    bench = benches.of_folder(config)
    modules = _modules(bench, config)
    relations, recipe = _relations(bench, config), _recipe(config)
    say(f"{len(bench.tasks)} tasks, {sum(map(len, bench.train))} training examples, kind {config.kind}")
    with bar(num_steps(bench, recipe), "training") as shown:
        found = train(bench, relations, recipe, settings, shown, modules)
    return _finish(config, run, bench, found)


def settings_of(config: CotrainConfig) -> Settings:
    """Raises ConfigError for a knob or loss that there is not."""
    return Settings(
        knobs=validate(Knobs, KNOBS.model_dump() | config.knob, "knob"),
        losses=validate(LossWeights, config.loss, "loss"),
        lr=config.graph_lr,
        learns_relations=config.learn_relations,
        learns_evidence=config.learn_evidence,
        ties_heads=config.tie_heads,
    )


def _free(config: CotrainConfig) -> Run:
    """The run's folder. Raises RunError if it is taken, InvalidNameError for what is no alias."""
    run = Run(config.runs / config.run_name)
    if run.exists:
        raise RunError(f"{run.folder} holds a run already: choose another --run")
    if config.alias:
        check_alias(config.alias)
    return run


def _recipe(config: CotrainConfig) -> Recipe:
    return Recipe(
        config.epochs, config.batch_size, config.lr, config.head_lr, config.warmup, config.clip, config.token_budget
    )


def _modules(bench: Workbench, config: CotrainConfig) -> Modules:
    modules = Modules(bench.tail, len(bench.tasks), config.seed, config.kind, config.hyperparameters)
    if not modules.places:
        raise ConfigError(
            f"kind {config.kind!r} changes nothing of the backbone from layer {config.first_layer} on, so there is "
            "nothing to compose; choose another --kind or --first-layer"
        )
    return modules


def _relations(bench: Workbench, config: CotrainConfig) -> Matrix:
    """R0 (T, T)."""
    if config.relations == "store":
        return benches.stored(config.store, config.graph, bench.names)
    return relating.estimate(relating.of_data(bench))


def _finish(config: CotrainConfig, run: Run, bench: Workbench, found: CoTrained) -> Outcome:
    """Weights as they will be served, dev accuracy by them, the run's folder, the store."""
    document = functools.partial(cotrained.document, config, bench, found)
    weights = publish.weights_of(document({}), bench.names, bench.num_layers)
    accuracy = _accuracy(bench, found, weights)
    new = cotrained.versions_of(config, bench, found, accuracy)
    cotrained.write(run, config, bench, found, new)
    version, references = publish.publish(config, new, document, cotrained.ACTOR)
    run.write("relations.json", _report(bench, found, weights, version))
    heads = [adapter.head for _, adapter in new if adapter.head]
    return Outcome(run, bench.names, version, references, weights, heads, accuracy, found)


def _accuracy(bench: Workbench, found: CoTrained, weights: Tensor) -> dict[str, float]:
    """Of the tasks that have dev texts."""
    with found.modules.resident(frozen=True):
        accuracy = publish.dev_accuracies(bench, found.heads, weights)
    if accuracy:
        say(f"dev accuracy {publish.mean(accuracy):.3f} over {len(accuracy)} tasks")
    return accuracy


def _report(bench: Workbench, found: CoTrained, weights: Tensor, version: int) -> dict[str, Any]:
    learned = found.learned
    return {
        "graph_version": version,
        "tasks": bench.names,
        "relations_at_start": learned.R0.tolist(),
        "relations": learned.R.detach().tolist(),
        "own_weight": [round(float(weights[t, t].mean()), 4) for t in range(len(weights))],
        "knobs": learned.settings.knobs.model_dump(),
    }
