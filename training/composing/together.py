"""cotrain: adapters, evidence, relations and heads trained together under the prior (cotrain.py), into run and store.

The path: read_tasks -> relations -> cotrain -> run folder as fit leaves it -> versions, graph and aliases in the store
(publish.py). Nothing is written before training is done.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.graph import Knobs
from adapters_store.manifest import HeadSpec, Manifest
from adapters_store.primitives.head import Head
from training import curve, export
from training.backbone import load
from training.composing import benches, publish
from training.composing.cotrain import KNOBS, CoTrained, Settings
from training.composing.cotrain import cotrain as train
from training.composing.export import graph_document
from training.composing.losses import LossWeights
from training.composing.settings import CotrainConfig
from training.config import validate
from training.errors import ConfigError, RunError
from training.progress import bar, say
from training.relations import Matrix
from training.run import Run, versions
from training.suite import relating
from training.suite.joint import History, Recipe, num_steps
from training.suite.modules import Modules
from training.suite.workbench import Workbench

ACTOR = "espalier-train cotrain"


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
    settings, run = settings_of(config), Run(config.runs / config.run_name)
    if run.exists:
        raise RunError(f"{run.folder} holds a run already: choose another --run")
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
        own_head=config.own_head,
        lr=config.graph_lr,
        learns_relations=config.learn_relations,
        learns_evidence=config.learn_evidence,
        ties_heads=config.tie_heads,
    )


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
    document = functools.partial(_document, config, bench, found)
    weights = publish.weights_of(document({}), bench.names, bench.num_layers)
    with found.modules.resident(frozen=True):
        accuracy = publish.dev_accuracies(bench, found.heads, weights)
    if accuracy:
        say(f"dev accuracy {publish.mean(accuracy):.3f} over {len(accuracy)} tasks")
    heads = [_head(bench, t, *found.heads[t]) for t in range(len(bench.tasks))]
    new = _versions(config, bench, found, heads, accuracy)
    run.begin(config, bench.tasks)
    for manifest, adapter in new:
        export.write(run.adapters / manifest.name, manifest, adapter)
    run.log(_lines(found.history, config))
    curve.draw(run.metrics(), run.folder / "learning_curve.png")
    version, references = publish.publish(config, new, document, ACTOR)
    run.write("relations.json", _report(bench, found, weights, version))
    run.write("summary.json", _summary(config, found, new, accuracy, version))
    return Outcome(run, bench.names, version, references, weights, heads, accuracy, found)


def _document(
    config: CotrainConfig, bench: Workbench, found: CoTrained, references: Mapping[str, str]
) -> publish.Document:
    noted = {"command": ACTOR, "run": config.run_name, "seed": config.seed, "versions": versions()} | found.facts
    learned = found.learned
    document = graph_document(learned.allocation, learned.R, bench.names, None, references, noted)
    return publish.described(document, bench.tasks)


def _head(bench: Workbench, t: int, weight: Tensor, bias: Tensor) -> Head:
    task = bench.tasks[t]
    spec = HeadSpec(
        labels=task.labels, label_texts=dict(task.label_texts), pooling=bench.backbone.default_pooling,
        max_length=bench.setting.max_length, tensors={name: f"head.{name}" for name in ("weight", "bias")},
    )  # fmt: skip
    return Head(spec, {"weight": weight.contiguous(), "bias": bias.contiguous()})


def _versions(
    config: CotrainConfig, bench: Workbench, found: CoTrained, heads: list[Head], accuracy: Mapping[str, float]
) -> list[tuple[Manifest, Adapter]]:
    """Every task's module and head; golden examples are what they give alone in float32."""
    new = []
    backbone = bench.backbone if config.dtype == "float32" else load(config.backbone)
    provenance = {"command": ACTOR, "seed": config.seed, "run": config.run_name, "versions": versions()}
    with bar(len(heads), "golden examples") as shown:
        for t, (task, head) in enumerate(zip(bench.tasks, heads, strict=True)):
            adapter = Adapter(found.modules.entries(t, frozen=True), head)
            manifest = export.manifest_of(
                adapter, bench.backbone.fingerprint, task,
                kind=config.kind,
                hyperparameters=found.modules.config.model_dump(mode="json"),
                metrics=_metrics(bench, t, accuracy),
                provenance=provenance | {"data_digest": task.digest},
                golden=export.golden(backbone, adapter, task),
            )  # fmt: skip
            new.append((manifest, adapter))
            shown.advance(note=task.name)
    return new


def _metrics(bench: Workbench, t: int, accuracy: Mapping[str, float]) -> dict[str, float]:
    counts = {"train_examples": float(len(bench.train[t])), "dev_examples": float(len(bench.test[t]))}
    name = bench.names[t]
    return counts | ({"dev_accuracy": accuracy[name]} if name in accuracy else {})


def _lines(history: History, config: CotrainConfig) -> list[dict[str, Any]]:
    """Of metrics.jsonl: the mean loss of all tasks and the gradient's norm, step by step."""
    per_epoch = math.ceil(len(history.losses) / config.epochs)
    return [
        {"task": "all", "step": n + 1, "epoch": n // per_epoch, "loss": loss, "norm": norm}
        for n, (loss, norm) in enumerate(zip(history.losses, history.norms, strict=True))
    ]


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


def _summary(
    config: CotrainConfig, found: CoTrained, new: list[tuple[Manifest, Adapter]], accuracy: Mapping[str, float],
    version: int,
) -> dict[str, Any]:  # fmt: skip
    parameters = sum(tensor.numel() for site in found.modules.parameters[0].values() for tensor in site.values())
    tasks = {
        manifest.name: dict(manifest.metrics)
        | {"parameters": parameters + sum(t.numel() for t in (adapter.head.tensors.values() if adapter.head else ()))}
        for manifest, adapter in new
    }
    return {
        "command": "cotrain", "kind": config.kind, "seed": config.seed, "graph_version": version,
        "mean_dev_accuracy": publish.mean(accuracy), "last_loss": found.history.losses[-1], "tasks": tasks,
        "learned": found.facts,
    }  # fmt: skip
