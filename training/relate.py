"""relate: how much the adapters of a run help each other's tasks, as a version of the store's relation graph.

The path: adapters of the run -> views (relations/) -> fuse -> graph document -> store. Everything is estimated on train
and dev texts; the test split is never read for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adapters_store.graph import Knobs, RelationGraph
from adapters_store.store import AdapterStore
from training import export, objectives
from training.backbone import load
from training.config import FitConfig, RelateConfig, validate
from training.errors import ConfigError
from training.prepare import sampling
from training.progress import bar, say
from training.relations import Matrix, fitted, heatmap, weights
from training.relations.evidence import evidence
from training.relations.fuse import agreement, fuse, shares, strongest, with_negatives
from training.relations.material import Material
from training.relations.transfer import Transfer
from training.relations.views import Shared, measure
from training.run import Run, versions
from training.tasks import Task, read_tasks

# With c = 0.3 on graphs this small the gate leaves nearly every task its own adapter. 0.6 with 4 neighbours lowered the
# log-loss on dev texts against single adapters: 0.554 to 0.489 on fdu_mtl (16 tasks), 0.718 to 0.685 on demo_data (11).
KNOBS = {"c": 0.6}


@dataclass(frozen=True, eq=False)
class Relations:
    """What was estimated. relations: R (K, K); views: by name, as measured; seconds: what each cost.

    fitted: mean Spearman per target of weights fitted without it, if weights were fitted.
    """

    tasks: list[str]
    relations: Matrix
    views: dict[str, Matrix]
    view_weights: dict[str, float]
    agreement: dict[str, float | None]
    transfer: Transfer | None
    seconds: dict[str, float]
    fitted: float | None = None


def relate(config: RelateConfig) -> int:
    """Estimate the relations of a finished run, write them into the store; the new graph's version."""
    knobs = validate(Knobs, KNOBS | config.knobs, "knob")
    run = Run(config.run)
    run.summary()  # refuses a run that is not finished
    material = gather(run, config)
    found = estimate(material, config)
    store = AdapterStore(config.store)
    document = document_of(found, material, store, config, knobs)
    version = store.publish_graph(document, config.alias, "espalier-train relate")
    run.write("relations.json", _report(found, version, document))
    heatmap.draw(
        found.tasks,
        found.relations,
        run.folder / "relations.png",
        f"R of graph version {version}: {_spearman_line(found)}",
    )
    size = f"{len(document['nodes'])} tasks, {len(document['edges'])} relations"
    say(f"graph version {version} in {config.store}: {size}; {_spearman_line(found)}")
    return version


def gather(run: Run, config: RelateConfig) -> Material:
    """Tasks, adapters and backbone of a run. Raises RunError if its data changed."""
    if config.threads:
        torch.set_num_threads(config.threads)
    trained: FitConfig = run.config()
    tasks = read_tasks(trained.data, sampling(trained), trained.tasks)
    run.check_data(tasks)
    adapters = [export.read(run.adapters / task.name)[1] for task in tasks]
    backbone = load(trained.backbone, config.dtype, config.device, generates=any(task.generates for task in tasks))
    judged = [
        objectives.trained(task, adapter, backbone, trained.length(generates=True))
        for task, adapter in zip(tasks, adapters, strict=True)
    ]
    return Material(tasks, adapters, judged, backbone)


def estimate(material: Material, config: RelateConfig) -> Relations:
    """All views and their fusion."""
    with bar(len(material.tasks) * len(config.views), "relating") as shown:
        shared = Shared(material, config, shown)
        views = measure(shared)
    return _fused(views, shared)


def _fused(views: dict[str, Matrix], shared: Shared) -> Relations:
    config, transfer = shared.config, shared.transfer if "transfer" in views else None
    unknown = sorted(set(config.view_weights) - set(views))
    if unknown:
        raise ConfigError(f"view_weights names {unknown[0]!r}, which is not among the views {', '.join(views)}")
    by_view, worth = shares(list(views), config.view_weights), None
    if config.fusion == "fitted":
        by_view, worth = _fit(views, by_view)
    relations = fuse(views, by_view)
    relations = with_negatives(relations, transfer) if transfer else relations
    agreed = agreement(views, transfer.change) if transfer else {}
    seconds = {name: round(value, 3) for name, value in shared.seconds.items()}
    kept = strongest(relations, config.neighbours)
    return Relations(shared.material.names, kept, views, by_view, agreed, transfer, seconds, worth)


def _fit(views: dict[str, Matrix], by_view: dict[str, float]) -> tuple[dict[str, float], float | None]:
    """Shares of the views, and how well such shares predict a target that they never saw. Transfer keeps its share."""
    predictors = {name: view for name, view in views.items() if name != "transfer"}
    if not predictors or "transfer" not in views:
        raise ConfigError("--fusion fitted needs the view transfer, to fit on, and at least one other view")
    found, left = fitted.weights(predictors, views["transfer"]), 1 - by_view["transfer"]
    chosen = {name: left * found[name] if name in found else by_view[name] for name in views}
    return chosen, fitted.left_out(predictors, views["transfer"])


def document_of(
    found: Relations, material: Material, store: AdapterStore, config: RelateConfig, knobs: Knobs
) -> dict[str, Any]:
    """Node-link JSON of the graph: tasks with their adapters, relations with the value of each view."""
    edges = _edges(found)
    by_layer = weights.similarity_by_layer(material.adapters, material.backbone.encoder.sites)
    attributes = {
        "knobs": knobs.model_dump(),
        "evidence": evidence(found.tasks, by_layer, edges) if config.evidence else {},
        "views": found.view_weights,
        "provenance": {
            "run": str(config.run),
            "versions": versions(),
            "spearman_with_transfer": found.agreement,
            "fusion": config.fusion,
            "seconds": found.seconds,
        },
    }
    document = {
        "directed": True,
        "multigraph": False,
        "graph": attributes,
        "nodes": [_node(task, store, config.alias) for task in material.tasks],
        "edges": [
            {"source": i, "target": j, "weight": w, "views": _view_values(found, i, j)} for (i, j), w in edges.items()
        ],
    }
    RelationGraph.from_json(document)  # refuses our own mistakes before they are written
    return document


def _node(task: Task, store: AdapterStore, alias: str | None) -> dict[str, Any]:
    has_alias = alias is not None and alias in store.aliases(task.name)
    return {
        "id": task.name,
        "adapter": f"{task.name}@{alias}" if has_alias else task.name,
        "description": task.description,
        "family": task.family,
    }


def _edges(found: Relations) -> dict[tuple[str, str], float]:
    rows, columns = np.nonzero(found.relations)
    pairs = [(i, j) for i, j in zip(rows.tolist(), columns.tolist(), strict=True) if i != j]
    return {(found.tasks[i], found.tasks[j]): round(float(found.relations[i, j]), 6) for i, j in pairs}


def _view_values(found: Relations, source: str, target: str) -> dict[str, float]:
    i, j = found.tasks.index(source), found.tasks.index(target)
    return {name: round(float(view[i, j]), 6) for name, view in found.views.items()}


def _report(found: Relations, version: int, document: Mapping[str, Any]) -> dict[str, Any]:
    measured = {}
    if found.transfer:
        measured = {
            "transfer_error": found.transfer.error.tolist(),
            "transfer_accuracy": found.transfer.accuracy.tolist(),
        }
    return {
        "graph_version": version,
        "tasks": found.tasks,
        "relations": found.relations.tolist(),
        "views": {name: view.tolist() for name, view in found.views.items()},
        "view_weights": found.view_weights,
        "spearman_with_transfer": found.agreement,
        "spearman_of_fitted_left_one_target_out": found.fitted,
        "seconds": found.seconds,
        "knobs": document["graph"]["knobs"],
    } | measured


def _spearman_line(found: Relations) -> str:
    others: Sequence[tuple[str, float]] = [
        (n, v) for n, v in found.agreement.items() if n != "transfer" and v is not None
    ]
    return "Spearman with measured transfer: " + (", ".join(f"{n} {v:.2f}" for n, v in others) or "not measured")
