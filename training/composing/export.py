"""What was learned, as the relation graph that the server composes by.

Every module is a node; those that no task owns have the role "module". Edges are R off the diagonal, evidence is E and
mass exp(log_mass), so that adapters_store/composition.py computes the weights of `Allocation.weights` with hard gates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from adapters_store.errors import InvalidGraphError
from adapters_store.graph import RelationGraph
from training.composing.allocation import Allocation

Attributes = dict[str, Any]


def graph_document(
    allocation: Allocation, R: Tensor, modules: Sequence[str], tasks: Sequence[str] | None = None,
    references: Mapping[str, str] = {}, provenance: Mapping[str, Any] = {},
) -> Attributes:  # fmt: skip
    """Node-link JSON of relations R (K, K) between modules and of the weights of tasks (T,) over them.

    tasks: names among the modules, in the order of the allocation's rows; all modules if not given. references: module
    -> adapter reference, where it is not the adapter of the module's name. Prior rows of the allocation must be those
    of R (prior.py). Raises InvalidGraphError for what no graph can say.
    """
    tasks = modules if tasks is None else tasks
    _check(allocation, R, modules, tasks)
    document = {
        "directed": True,
        "multigraph": False,
        "graph": {
            "knobs": allocation.knobs.model_dump(),
            "evidence": _evidence(allocation.evidence, modules, tasks),
            "mass": _mass(allocation.log_mass, tasks),
            "provenance": dict(provenance),
        },
        "nodes": [_node(module, module in set(tasks), references.get(module)) for module in modules],
        "edges": _edges(R, modules),
    }
    return RelationGraph.from_json(document).to_json()


def _check(allocation: Allocation, R: Tensor, modules: Sequence[str], tasks: Sequence[str]) -> None:
    expected = (len(tasks), len(modules))
    if tuple(allocation.evidence.shape[:2]) != expected or tuple(R.shape) != (len(modules), len(modules)):
        shapes = f"evidence {tuple(allocation.evidence.shape)}, relations {tuple(R.shape)}"
        raise InvalidGraphError(f"{len(tasks)} tasks over {len(modules)} modules do not fit {shapes}")
    if strangers := sorted(set(tasks) - set(modules)):
        raise InvalidGraphError(f"task {strangers[0]!r} is not among the modules, so it would have no node")


def _node(module: str, is_task: bool, reference: str | None) -> Attributes:
    return {"id": module, "adapter": reference, "role": "task" if is_task else "module"}


def _edges(R: Tensor, modules: Sequence[str]) -> list[Attributes]:
    """R off the diagonal, without zeros."""
    return [
        {"source": source, "target": target, "weight": weight}
        for source, row in zip(modules, R.detach().tolist(), strict=True)
        for target, weight in zip(modules, row, strict=True)
        if source != target and weight
    ]


def _evidence(evidence: Tensor, modules: Sequence[str], tasks: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Task -> module -> evidence per layer; what is 0 everywhere is left out, which means the same."""
    found = {
        task: {module: values for module, values in zip(modules, row, strict=True) if any(values)}
        for task, row in zip(tasks, evidence.detach().tolist(), strict=True)
    }
    return {task: row for task, row in found.items() if row}


def _mass(log_mass: Tensor, tasks: Sequence[str]) -> dict[str, list[float]]:
    """Task -> mass per layer, of tasks whose mass is not 1 everywhere."""
    masses = log_mass.detach().double().exp().tolist()
    return {task: values for task, values in zip(tasks, masses, strict=True) if any(value != 1 for value in values)}
