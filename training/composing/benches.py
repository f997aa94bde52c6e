"""The bench that `compose` and `cotrain` work on, of a run's tasks or of a folder's; its test texts are dev texts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adapters_store.adapter import Adapter
from adapters_store.errors import BackboneMismatchError
from adapters_store.graph import RelationGraph
from adapters_store.manifest import Manifest
from adapters_store.primitives.head import Head
from adapters_store.sites import Sites
from adapters_store.store import AdapterStore
from training import export
from training.backbone import LoadedBackbone, load
from training.composing.settings import ComposeConfig, CotrainConfig
from training.errors import ConfigError, DataError, RunError
from training.prepare import sampling
from training.progress import bar
from training.relations import Matrix
from training.run import Run
from training.suite.methods import Nodes
from training.suite.workbench import Setting, Workbench, texts_of
from training.tail import Tail
from training.tasks import Sampling, Task, read_tasks


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """What a run left: its tasks on a bench, its adapters, and what it says of them."""

    bench: Workbench
    nodes: Nodes
    manifests: list[Manifest]
    heads: list[Head]


def of_run(run: Run, config: ComposeConfig) -> Trained:
    """The tasks and adapters of a finished run. Raises RunError, DataError, BackboneMismatchError."""
    run.summary()  # refuses a run that is not finished
    trained = run.config()
    tasks = _classifying(read_tasks(trained.data, sampling(trained), trained.tasks), "compose")
    run.check_data(tasks)
    read = [export.read(run.adapters / task.name) for task in tasks]
    manifests, adapters = [manifest for manifest, _ in read], [adapter for _, adapter in read]
    backbone = load(trained.backbone, config.dtype)
    _check_backbone(backbone, manifests)
    heads = [_head_of(task, adapter) for task, adapter in zip(tasks, adapters, strict=True)]
    setting = Setting(
        (trained.data,), trained.examples, trained.seed, None, _length(heads[0], backbone),
        first_layer(adapters, backbone.encoder.sites), trained.backbone, config.dtype, config.token_budget,
    )  # fmt: skip
    backbone = dataclasses.replace(backbone, default_pooling=heads[0].spec.pooling)
    nodes = Nodes(adapters, [(head.tensors["weight"].float(), head.tensors["bias"].float()) for head in heads])
    return Trained(bench_of(setting, backbone, tasks, _tail(backbone, setting)), nodes, manifests, heads)


def of_folder(config: CotrainConfig) -> Workbench:
    """The tasks of a folder. Raises DataError, ConfigError."""
    cuts = Sampling(config.seed, config.examples, config.dev_fraction)
    tasks = _classifying(read_tasks(config.data, cuts, config.tasks), "cotrain")
    backbone = load(config.backbone, config.dtype)
    backbone = dataclasses.replace(backbone, default_pooling=config.pooling or backbone.default_pooling)
    setting = Setting(
        (config.data,), config.examples, config.seed, None, min(config.max_length, backbone.encoder.max_length),
        config.first_layer, config.backbone, config.dtype, config.token_budget,
    )  # fmt: skip
    return bench_of(setting, backbone, tasks, Tail(backbone.encoder, config.first_layer))


def bench_of(setting: Setting, backbone: LoadedBackbone, tasks: list[Task], tail: Tail) -> Workbench:
    """Texts encoded, and run up to the tail's first layer; dev texts in the place of test texts."""
    with bar(len(tasks), "reading texts") as shown:
        train, dev = [], []
        for task in tasks:
            train.append(texts_of(backbone, tail, setting, task, task.train))
            dev.append(texts_of(backbone, tail, setting, task, task.dev))
            shown.advance(note=task.name)
    return Workbench(setting, backbone, tail, tasks, train, dev)


def first_layer(adapters: Sequence[Adapter], sites: Sites) -> int:
    """The lowest layer at which one of the adapters acts; 0 for adapters without sites."""
    return min((sites.add(e.site).place.layer for adapter in adapters for e in adapter.entries), default=0)


def stored(folder: Path, version: int | None, tasks: Sequence[str]) -> Matrix:
    """R0 (T, T) of a graph in the store, harm cut to 0, diagonal 1. Raises GraphNotFoundError, DataError."""
    number, document = AdapterStore(folder).graph(version)
    graph = RelationGraph.from_json(document)
    missing = [task for task in tasks if task not in graph.nodes]
    if missing:
        raise DataError(f"graph version {number} of {folder} has no task {missing[0]!r}; leave --relations store out")
    edges = {(a, b): weight for a, b, weight in graph.network.edges(data="weight")}
    found: Matrix = np.array([[max(0.0, edges.get((a, b), 0.0)) for b in tasks] for a in tasks])
    np.fill_diagonal(found, 1)
    return found


def _classifying(tasks: list[Task], command: str) -> list[Task]:
    odd = [task.name for task in tasks if task.generates]
    if odd:
        raise DataError(f"task {odd[0]!r} generates; {command} is for tasks that classify, relate composes the others")
    return tasks


def _check_backbone(backbone: LoadedBackbone, manifests: Sequence[Manifest]) -> None:
    for manifest in manifests:
        if not manifest.backbone.is_same(backbone.fingerprint):
            raise BackboneMismatchError(f"{manifest.name} was trained on another backbone than {backbone.folder}")


def _head_of(task: Task, adapter: Adapter) -> Head:
    head = adapter.head
    if head is None or head.spec.labels != task.labels or set(head.tensors) != {"weight", "bias"}:
        raise RunError(f"the adapter of {task.name} has no linear head for the labels {', '.join(task.labels)}")
    return head


def _length(head: Head, backbone: LoadedBackbone) -> int:
    limit = backbone.encoder.max_length
    return min(head.spec.max_length or limit, limit)


def _tail(backbone: LoadedBackbone, setting: Setting) -> Tail:
    """From the adapters' first layer on, where the backbone can be run so."""
    try:
        return Tail(backbone.encoder, setting.first_layer)
    except ConfigError:
        return Tail(backbone.encoder, 0)
