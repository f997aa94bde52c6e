"""Our methods of a suite by name: by the estimated graph, and with the graph replaced to see whether it matters.

identity: no relations, each task alone; uniform: all related alike; random: the estimated graph with its nodes renamed
at random; oracle: relations from measured transfer. All else stays the same.
"""

from collections.abc import Callable

import numpy as np

from training.composing import shapes, unknown
from training.composing.cotrain import cotrain
from training.composing.pluggable import compose
from training.errors import DataError
from training.relations import Matrix
from training.suite import relating
from training.suite.methods import Method, Nodes, Result, accuracies, pooled_under
from training.suite.modules import mixes
from training.suite.workbench import Workbench

Relations = Callable[[Workbench, Nodes | None], Matrix]


def estimated(bench: Workbench, nodes: Nodes | None) -> Matrix:  # noqa: ARG001  # one signature for all
    """R0 from the tasks' examples."""
    return relating.estimate(relating.of_data(bench))


def renamed(bench: Workbench, nodes: Nodes | None) -> Matrix:
    """The same graph on the wrong tasks."""
    return relating.renamed(estimated(bench, nodes), bench.setting.seed)


def identity(bench: Workbench, nodes: Nodes | None) -> Matrix:  # noqa: ARG001  # one signature for all
    """No relations."""
    return np.eye(len(bench.tasks))


def uniform(bench: Workbench, nodes: Nodes | None) -> Matrix:  # noqa: ARG001  # one signature for all
    """All related alike."""
    return np.ones((len(bench.tasks), len(bench.tasks)))


def oracle(bench: Workbench, nodes: Nodes | None) -> Matrix:
    """Relations from measured transfer of the nodes."""
    if nodes is None:
        raise AssertionError("our bug: transfer needs node adapters")
    return relating.oracle(relating.transfer(bench, nodes))


def _pluggable(relations: Relations, *, leaves_out: bool = False) -> Callable[[Workbench, Nodes], Result]:
    def run(bench: Workbench, nodes: Nodes) -> Result:
        found = compose(bench, nodes, relations(bench, nodes))
        pooled = pooled_under(bench, nodes, found.weights, bench.test)
        facts = dict(found.facts) | {"accuracy_own_heads": accuracies(nodes.heads, pooled, bench.test)}
        facts |= shapes.of_weights(found.weights, nodes.adapters, bench.tail.encoder.sites)
        if leaves_out:
            facts |= shapes.of_leaving_out(bench, nodes, found.weights, found.heads)
        return Result(accuracies(found.heads, pooled, bench.test), found.weights, facts)

    return run


def _joint(relations: Relations) -> Callable[[Workbench, Nodes], Result]:
    def run(bench: Workbench, nodes: Nodes) -> Result:  # noqa: ARG001  # it trains its own
        found = cotrain(bench, relations(bench, None))
        with found.modules.resident(frozen=True):
            pooled = [bench.pooled(part, mix) for part, mix in zip(bench.test, mixes(found.weights), strict=True)]
        facts = found.facts | shapes.of_training(found.history)
        facts |= shapes.of_weights(found.weights, found.modules.adapters(), bench.tail.encoder.sites)
        return Result(accuracies(found.heads, pooled, bench.test), found.weights, facts)

    return run


def _left_out(run: Callable[[Workbench, Nodes], Result]) -> Callable[[Workbench, Nodes], Result]:
    """The method, refused where no other task would be left."""

    def checked(bench: Workbench, nodes: Nodes) -> Result:
        if len(bench.tasks) < 2:
            raise DataError("unknown tasks are answered by the other tasks' adapters: the suite needs at least 2 tasks")
        return run(bench, nodes)

    return checked


_ALL = (
    Method("ours", "pluggable", _pluggable(estimated, leaves_out=True), "this project"),
    Method("ours-random", "pluggable", _pluggable(renamed), "falsifier"),
    Method("ours-joint", "joint", _joint(estimated), "this project"),
    Method("ours-joint-random", "joint", _joint(renamed), "falsifier"),
    Method("ours-identity", "pluggable", _pluggable(identity), "falsifier"),
    Method("ours-uniform", "pluggable", _pluggable(uniform), "falsifier"),
    Method("ours-oracle", "pluggable", _pluggable(oracle), "falsifier"),
    Method("ours-joint-identity", "joint", _joint(identity), "falsifier"),
    Method("ours-joint-uniform", "joint", _joint(uniform), "falsifier"),
    Method("unknown-ours", "unknown", _left_out(unknown.ours), "this project"),
    Method("unknown-ours-description", "unknown", _left_out(unknown.ours_described), "this project"),
    Method("unknown-adaptersoup", "unknown", _left_out(unknown.soup), "Chronopoulou et al. 2023"),
    Method("unknown-arrow", "unknown", _left_out(unknown.arrows), "Ostapenko et al. 2024"),
    Method("unknown-nearest", "unknown", _left_out(unknown.nearest), "Chronopoulou et al. 2023, l = 1"),
    Method("unknown-bare", "unknown", _left_out(unknown.bare), "Alain & Bengio 2016, linear probe"),
)
OURS: dict[str, Method] = {method.name: method for method in _ALL}
