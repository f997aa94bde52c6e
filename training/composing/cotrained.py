"""What co-training leaves: a run folder as fit leaves it, its adapters as versions to publish, and the graph.

config.json, environment.json, metrics.jsonl (the mean loss of all tasks and the gradient's norm, step by step),
learning_curve.png, graph.json (without references), adapters/<task>/, and summary.json, written last.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.manifest import HeadSpec, Manifest
from adapters_store.primitives.head import Head
from training import curve, export
from training.backbone import LoadedBackbone, load
from training.composing import publish
from training.composing.cotrain import CoTrained
from training.composing.export import graph_document
from training.composing.settings import CotrainConfig
from training.progress import bar
from training.run import Run, versions
from training.suite.joint import History
from training.suite.workbench import Workbench

ACTOR = "espalier-train cotrain"
New = Sequence[tuple[Manifest, Adapter]]


def document(
    config: CotrainConfig, bench: Workbench, found: CoTrained, references: Mapping[str, str]
) -> publish.Document:
    """The graph: learned relations and evidence. references: task -> adapter version, where there is one yet."""
    noted = {"command": ACTOR, "run": config.run_name, "seed": config.seed, "versions": versions()} | found.facts
    learned = found.learned
    said = graph_document(learned.allocation, learned.R, bench.names, None, references, noted)
    return publish.described(said, bench.tasks)


def versions_of(
    config: CotrainConfig, bench: Workbench, found: CoTrained, accuracy: Mapping[str, float]
) -> list[tuple[Manifest, Adapter]]:
    """Every task's module and head; golden examples are what they give alone in float32."""
    backbone = bench.backbone if config.dtype == "float32" else load(config.backbone)
    new = []
    with bar(len(bench.tasks), "golden examples") as shown:
        for t, task in enumerate(bench.tasks):
            adapter = Adapter(found.modules.entries(t, frozen=True), _head(bench, t, *found.heads[t]))
            new.append((_manifest(config, bench, found, t, adapter, accuracy, backbone), adapter))
            shown.advance(note=task.name)
    return new


def write(run: Run, config: CotrainConfig, bench: Workbench, found: CoTrained, new: New) -> None:
    """The run's folder."""
    run.begin(config, bench.tasks)
    for manifest, adapter in new:
        export.write(run.adapters / manifest.name, manifest, adapter)
    run.log(_lines(found.history, config))
    curve.draw(run.metrics(), run.folder / "learning_curve.png")
    run.write("graph.json", document(config, bench, found, {}))
    run.write("summary.json", _summary(config, found, new))


def _manifest(
    config: CotrainConfig, bench: Workbench, found: CoTrained, t: int, adapter: Adapter, accuracy: Mapping[str, float],
    backbone: LoadedBackbone,
) -> Manifest:  # fmt: skip
    """backbone: in float32, for golden examples."""
    task = bench.tasks[t]
    noted = {"command": ACTOR, "seed": config.seed, "run": config.run_name, "versions": versions()}
    return export.manifest_of(
        adapter,
        bench.backbone.fingerprint,
        task,
        kind=config.kind,
        hyperparameters=found.modules.config.model_dump(mode="json"),
        metrics=_metrics(bench, t, accuracy),
        provenance=noted | {"data_digest": task.digest},
        golden=export.golden(backbone, adapter, task),
    )


def _head(bench: Workbench, t: int, weight: Tensor, bias: Tensor) -> Head:
    task = bench.tasks[t]
    spec = HeadSpec(
        labels=task.labels, label_texts=dict(task.label_texts), pooling=bench.backbone.default_pooling,
        max_length=bench.setting.max_length, tensors={name: f"head.{name}" for name in ("weight", "bias")},
    )  # fmt: skip
    return Head(spec, {"weight": weight.contiguous(), "bias": bias.contiguous()})


def _metrics(bench: Workbench, t: int, accuracy: Mapping[str, float]) -> dict[str, float]:
    counts = {"train_examples": float(len(bench.train[t])), "dev_examples": float(len(bench.test[t]))}
    name = bench.names[t]
    return counts | ({"dev_accuracy": accuracy[name]} if name in accuracy else {})


def _lines(history: History, config: CotrainConfig) -> list[dict[str, Any]]:
    """Of metrics.jsonl."""
    per_epoch = math.ceil(len(history.losses) / config.epochs)
    return [
        {"task": "all", "step": n + 1, "epoch": n // per_epoch, "loss": loss, "norm": norm}
        for n, (loss, norm) in enumerate(zip(history.losses, history.norms, strict=True))
    ]


def _summary(config: CotrainConfig, found: CoTrained, new: New) -> dict[str, Any]:
    tasks = {manifest.name: dict(manifest.metrics) | {"parameters": _size(adapter)} for manifest, adapter in new}
    accuracy = {name: about["dev_accuracy"] for name, about in tasks.items() if "dev_accuracy" in about}
    return {
        "command": "cotrain", "kind": config.kind, "seed": config.seed, "mean_dev_accuracy": publish.mean(accuracy),
        "last_loss": found.history.losses[-1], "tasks": tasks, "learned": found.facts,
    }  # fmt: skip


def _size(adapter: Adapter) -> int:
    """Numbers in an adapter, head included."""
    head = adapter.head.tensors.values() if adapter.head else ()
    return sum(t.numel() for t in (*head, *(t for entry in adapter.entries for t in entry.tensors.values())))
