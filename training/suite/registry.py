"""The methods of a suite by name, in the order of reports, and how relations are measured."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from training.suite.methods import Method, Nodes, Result, accuracies, pooled_under
from training.suite.modules import one_hot, uniform
from training.suite.workbench import Workbench

Relate = Callable[[Workbench, Nodes], dict[str, Any]]

RELATE: Relate | None = None  # what the job `relations` of each cell runs; its answer becomes the cell's JSON


def _under(bench: Workbench, nodes: Nodes, weights: Tensor) -> Result:
    pooled = pooled_under(bench, nodes, weights, bench.test)
    return Result(accuracies(nodes.heads, pooled, bench.test), weights)


def _single(bench: Workbench, nodes: Nodes) -> Result:
    return _under(bench, nodes, one_hot(len(bench.tasks), bench.num_layers))


def _uniform(bench: Workbench, nodes: Nodes) -> Result:
    size = len(bench.tasks)
    return _under(bench, nodes, uniform(size, size, bench.num_layers))


_ALL = (
    Method("single", "pluggable", _single, "each task its own adapter"),
    Method("uniform", "pluggable", _uniform, "all adapters alike"),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
