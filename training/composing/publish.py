"""Adapters and the graph that composes them, into a store so that a server changes over in one step.

New versions first, then a graph whose nodes name exactly these versions, then the aliases. A head that was fitted under
a composition is right for its very adapters and weights, so nodes do not follow an alias: what serves is the whole of
one `compose` or `cotrain` until there is another graph. A server in mode prior goes from the old whole to the new one
when it sees the graph.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapters_store import composition
from adapters_store.adapter import Adapter
from adapters_store.graph import RelationGraph
from adapters_store.manifest import Manifest
from adapters_store.prior import Prior
from adapters_store.store import AdapterStore
from training.composing.settings import Composing
from training.progress import bar, say
from training.publish import as_version
from training.suite.heads import HeadTensors, accuracy
from training.suite.modules import mixes
from training.suite.workbench import Workbench
from training.tasks import Task

SERVED = 64  # adapters for one row that a server composes unless it is told otherwise
Document = dict[str, Any]
DocumentOf = Callable[[Mapping[str, str]], Document]  # task -> reference of its new version


def publish(
    config: Composing, new: Sequence[tuple[Manifest, Adapter]], document_of: DocumentOf, actor: str
) -> tuple[int, list[str]]:
    """Version of the graph and references of the adapters; the manifests' versions are the store's to give."""
    store = AdapterStore(config.store)
    with bar(len(new), "publishing") as shown:
        published = []
        for manifest, adapter in new:
            published.append(as_version(store, manifest, adapter, config.actor))
            shown.advance(note=published[-1].reference)
    document = document_of({one.name: one.reference for one in published})
    _tell_width(document)
    version = store.publish_graph(document, config.alias, config.actor or actor)
    for one in published if config.alias else ():
        store.set_alias(one.name, str(config.alias), one.version, config.actor)
    references = [one.reference for one in published]
    alias = f" as @{config.alias}" if config.alias else ""
    say(f"published into {config.store}: {', '.join(references)}{alias}, composed by graph version {version}")
    return version, references


def _tell_width(document: Document) -> None:
    """A server refuses rows of more adapters than it was started for."""
    graph = RelationGraph.from_json(document)
    rows = Prior(graph).row
    widest = max((len(rows(task)) for task in graph.nodes), default=0)
    if graph.knobs.top_k is None and widest > SERVED:
        say(
            f"up to {widest} adapters for one row: serve with --max-adapters {widest}, or set the knob top_k or epsilon"
        )


def described(document: Document, tasks: Sequence[Task]) -> Document:
    """The document with what the tasks say of themselves at their nodes."""
    about = {task.name: {"description": task.description, "family": task.family} for task in tasks}
    return document | {"nodes": [node | about.get(node["id"], {}) for node in document["nodes"]]}


def weights_of(document: Document, tasks: Sequence[str], num_layers: int) -> Tensor:
    """(T, K, num_layers) float32 what a server composes for each task by the document."""
    graph = RelationGraph.from_json(document)
    rows, attributes = Prior(graph).row, graph.attributes
    found = torch.zeros(len(tasks), len(tasks), num_layers)
    for t, task in enumerate(tasks):
        evidence, mass = attributes.evidence.get(task, {}), attributes.mass.get(task, ())
        composed = composition.from_prior(rows(task), evidence, graph.knobs, num_layers, mass, rows)
        for module, values in composed.items():
            found[t, tasks.index(module)] = torch.from_numpy(values)
    return found


def dev_accuracies(bench: Workbench, heads: Sequence[HeadTensors], weights: Tensor) -> dict[str, float]:
    """Task -> share of its dev texts that are answered right by what is resident; tasks without any are left out."""
    asked = zip(bench.tasks, heads, bench.test, mixes(weights), strict=True)
    return {
        task.name: accuracy(head, bench.pooled(texts, mix), texts.targets)
        for task, head, texts, mix in asked if len(texts)
    }  # fmt: skip


def mean(values: Mapping[str, float]) -> float | None:
    """None of nothing."""
    return sum(values.values()) / len(values) if values else None
