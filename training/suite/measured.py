"""All views of a cell's nodes, and how well each predicts the measured transfer: what the report shows of relations.

Transfer and what needs no trunk run on the bench, from its N examples. The trunk's views (lookahead, gradients,
task2vec) and cka read the same examples through the whole backbone (relations/views.py).
"""

from pathlib import Path
from typing import Any

import numpy as np

from adapters_store.adapter import Adapter
from adapters_store.manifest import HeadSpec
from adapters_store.primitives.head import Head
from training import objectives
from training.config import RelateConfig
from training.progress import Quiet
from training.relations import arrow, subspace
from training.relations.fuse import agreement
from training.relations.material import Material
from training.relations.views import Shared, measure
from training.suite import relating
from training.suite.methods import Nodes
from training.suite.workbench import Workbench

_BY_TRUNK = ("lookahead", "gradients", "task2vec", "cka")


def relations(bench: Workbench, nodes: Nodes) -> dict[str, Any]:
    """For JSON: tasks, R0 as ours uses it, views, measured transfer, seconds, Spearman of each view with transfer."""
    views = relating.of_nodes(bench, nodes)
    views.add("arrow", lambda: arrow.similarity(nodes.adapters))
    views.add("subspace", lambda: subspace.similarity(nodes.adapters))
    shared = Shared(material_of(bench, nodes), RelateConfig(run=Path("none"), views=_BY_TRUNK), Quiet())
    views.matrices.update(measure(shared))
    views.seconds.update({name: round(value, 3) for name, value in shared.seconds.items()})
    agreed = agreement(views.matrices, views.matrices["transfer"])
    return views.to_json() | {
        "relations": np.round(relating.estimate(views), 5).tolist(),
        "transfer": np.round(views.matrices["transfer"], 5).tolist(),
        "spearman": agreed,
    }


def material_of(bench: Workbench, nodes: Nodes) -> Material:
    """Tasks, adapters with their heads, and objectives, as the views of `relate` want them."""
    pooling = bench.backbone.default_pooling
    adapters, judged = [], []
    for task, adapter, (weight, bias) in zip(bench.tasks, nodes.adapters, nodes.heads, strict=True):
        names = {"weight": "head.weight", "bias": "head.bias"}
        spec = HeadSpec(labels=task.labels, pooling=pooling, max_length=bench.setting.max_length, tensors=names)
        adapters.append(Adapter(adapter.entries, Head(spec, {"weight": weight, "bias": bias})))
        judged.append(objectives.trained(task, adapters[-1], bench.backbone))
    return Material(list(bench.tasks), adapters, judged, bench.backbone)
