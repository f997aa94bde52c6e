"""compose: the adapters of a run, trained apart, composed by the graph of their tasks and published so (pluggable.py).

The path: run -> relations -> weights and heads -> versions, graph and aliases in the store (publish.py), composed.json
in the run's folder. The adapters stay as they are; a version of each has the head that answers under the composition.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.graph import Knobs
from adapters_store.manifest import Manifest
from adapters_store.primitives.head import Head
from adapters_store.references import check_alias
from training import export
from training.backbone import load
from training.composing import benches, publish
from training.composing.allocation import Allocation
from training.composing.benches import Trained
from training.composing.export import graph_document
from training.composing.pluggable import USUAL, Composed, knobs_of
from training.composing.pluggable import compose as compose_nodes
from training.composing.settings import ComposeConfig
from training.config import validate
from training.progress import bar, say
from training.relations import Matrix
from training.run import Run, versions
from training.suite import relating
from training.suite.modules import one_hot, resident

ACTOR = "espalier-train compose"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was published. weights: (T, K, num_layers) that heads were fitted under; accuracy: on dev texts, by task."""

    tasks: list[str]
    version: int
    references: list[str]
    weights: Tensor
    heads: list[Head]
    accuracy: dict[str, float]
    accuracy_alone: dict[str, float]


def compose(config: ComposeConfig) -> Outcome:
    """Compose a finished run's adapters and publish the whole. Raises a TrainingError or InvalidGraphError."""
    if config.threads:
        torch.set_num_threads(config.threads)
    knobs = validate(Knobs, knobs_of(USUAL).model_dump() | config.knobs, "knob")
    if config.alias:
        check_alias(config.alias)
    run = Run(config.run)
    trained = benches.of_run(run, config)
    relations = _relations(trained, config)
    choices = replace(USUAL, own_head=config.own_head, l2=config.l2, has_mass=config.mass)
    with bar(len(trained.bench.tasks), "composing") as shown:
        found = compose_nodes(trained.bench, trained.nodes, relations, choices, knobs, shown)
    outcome = _published(config, trained, relations, found, knobs)
    run.write("composed.json", _report(config, outcome, relations, knobs))
    return outcome


def _relations(trained: Trained, config: ComposeConfig) -> Matrix:
    """R0 (T, T)."""
    say(f"relations from {config.relations}")
    if config.relations == "store":
        return benches.stored(config.store, config.graph, trained.bench.names)
    if config.relations == "transfer":
        return relating.oracle(relating.transfer(trained.bench, trained.nodes))
    return relating.estimate(relating.of_data(trained.bench))


def _published(
    config: ComposeConfig, trained: Trained, relations: Matrix, found: Composed, knobs: Knobs
) -> Outcome:  # fmt: skip
    bench, heads = trained.bench, _heads(trained, found)
    provenance = _provenance(config, knobs)
    document = functools.partial(_document, trained, relations, found, knobs, provenance)
    accuracy, alone = _accuracies(trained, found)
    judged = {name: {"dev_accuracy_composed": accuracy[name], "dev_accuracy_apart": alone[name]} for name in accuracy}
    new = _versions(config, trained, heads, judged, provenance)
    version, references = publish.publish(config, new, document, ACTOR)
    return Outcome(bench.names, version, references, found.weights, heads, accuracy, alone)


def _heads(trained: Trained, found: Composed) -> list[Head]:
    return [
        Head(head.spec, {"weight": weight.contiguous(), "bias": bias.contiguous()})
        for head, (weight, bias) in zip(trained.heads, found.heads, strict=True)
    ]


def _provenance(config: ComposeConfig, knobs: Knobs) -> dict[str, Any]:
    return {
        "run": config.run.name,
        "relations": config.relations,
        "own_head": config.own_head,
        "l2": config.l2,
        "knobs": knobs.model_dump(),
        "versions": versions(),
    }


def _document(
    trained: Trained, relations: Matrix, found: Composed, knobs: Knobs, provenance: Mapping[str, Any],
    references: Mapping[str, str],
) -> publish.Document:  # fmt: skip
    """Edges are R0, mass is what the weights sum to; no evidence."""
    bench = trained.bench
    mass = found.weights.double().sum(dim=1)  # (T, num_layers)
    size = len(bench.tasks)
    allocation = Allocation(torch.zeros(size, size, bench.num_layers), mass.log(), knobs)
    noted = {"command": ACTOR, **provenance}
    document = graph_document(allocation, torch.from_numpy(relations), bench.names, None, references, noted)
    return publish.described(document, bench.tasks)


def _accuracies(trained: Trained, found: Composed) -> tuple[dict[str, float], dict[str, float]]:
    """On dev texts: as composed, and of each adapter alone under its own head."""
    bench, nodes = trained.bench, trained.nodes
    with resident(bench.tail, [adapter.entries for adapter in nodes.adapters]):
        composed = publish.dev_accuracies(bench, found.heads, found.weights)
        alone = publish.dev_accuracies(bench, nodes.heads, one_hot(len(bench.tasks), bench.num_layers))
    if composed:
        say(f"dev accuracy {publish.mean(composed):.3f} composed, {publish.mean(alone):.3f} apart")
    return composed, alone


def _versions(
    config: ComposeConfig, trained: Trained, heads: list[Head], judged: Mapping[str, Mapping[str, float]],
    provenance: Mapping[str, Any],
) -> list[tuple[Manifest, Adapter]]:  # fmt: skip
    """The run's adapters with their new heads; golden examples are what each gives alone in float32."""
    bench, new = trained.bench, []
    backbone = bench.backbone if config.dtype == "float32" else load(bench.setting.backbone)
    with bar(len(heads), "golden examples") as shown:
        for task, manifest, node, head in zip(
            bench.tasks, trained.manifests, trained.nodes.adapters, heads, strict=True
        ):
            adapter = Adapter(node.entries, head)
            changes = {
                "metrics": dict(manifest.metrics) | dict(judged.get(task.name, {})),
                "provenance": dict(manifest.provenance) | {"composed": dict(provenance)},
                "golden": tuple(export.golden(backbone, adapter, task)),
            }
            new.append((manifest.model_copy(update=changes), adapter))
            shown.advance(note=task.name)
    return new


def _report(config: ComposeConfig, outcome: Outcome, relations: Matrix, knobs: Knobs) -> dict[str, Any]:
    return {
        "graph_version": outcome.version,
        "adapters": outcome.references,
        "tasks": outcome.tasks,
        "relations_from": config.relations,
        "relations": relations.tolist(),
        "knobs": knobs.model_dump(),
        "mass": [[round(m, 4) for m in row] for row in outcome.weights.sum(dim=1).tolist()],
        "own_weight": [round(float(outcome.weights[t, t].mean()), 4) for t in range(len(outcome.tasks))],
        "dev_accuracy_composed": outcome.accuracy,
        "dev_accuracy_apart": outcome.accuracy_alone,
    }
