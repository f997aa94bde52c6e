"""An exported graph, composed by the store's own code, has the weights that were learned."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given

from adapters_store import composition
from adapters_store.errors import InvalidGraphError
from adapters_store.graph import Knobs, RelationGraph
from adapters_store.prior import Prior
from tests.strategies import light
from tests.training.composing.test_allocation import LAYERS, knobs, seeds
from tests.training.composing.test_prior import relations
from training.composing.allocation import Allocation
from training.composing.cotrain import Learned, Settings
from training.composing.export import graph_document
from training.composing.prior import prior

MODULES = ["books", "films", "music", "skill-a", "skill-b"]
TASKS = ["music", "books", "films"]
ROWS = [2, 0, 1]


def learned(seed, knobs):
    generator = torch.Generator().manual_seed(seed)
    evidence = torch.randn(3, 5, LAYERS, generator=generator, dtype=torch.float64)
    log_mass = torch.randn(3, LAYERS, generator=generator, dtype=torch.float64)
    return torch.from_numpy(relations(seed)), Allocation(evidence, log_mass, knobs)


def composed(document, task):
    graph = RelationGraph.from_json(json.loads(json.dumps(document)))
    rows, attributes = Prior(graph), graph.attributes
    evidence, mass = attributes.evidence.get(task, {}), attributes.mass.get(task, ())
    found = composition.from_prior(rows.row(task), evidence, graph.knobs, LAYERS, mass, rows.row)
    return np.stack([found.get(module, np.zeros(LAYERS)) for module in MODULES])


@light
@given(seeds, knobs)
def test_the_server_composes_what_was_learned(seed, knobs):
    R, allocation = learned(seed, knobs)
    document = graph_document(allocation, R, MODULES, TASKS)
    S = prior(R, knobs)
    weights = allocation.weights(S[ROWS], S)
    for t, task in enumerate(TASKS):
        np.testing.assert_allclose(composed(document, task), weights[t].numpy(), atol=1e-5, rtol=1e-5)


def test_modules_that_no_task_owns_say_so_and_what_says_nothing_is_left_out():
    R = torch.eye(5)
    R[0, 3] = 0.5
    allocation = Allocation(torch.zeros(3, 5, 2), torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), Knobs())
    document = graph_document(allocation, R, MODULES, TASKS, {"skill-a": "shared@prod"}, {"seed": 3})
    graph = RelationGraph.from_json(document)
    assert graph.tasks == ["books", "films", "music"]
    assert graph.nodes["skill-a"].adapter == "shared@prod"
    assert document["edges"] == [{"source": "books", "target": "skill-a", "weight": 0.5}]
    assert document["graph"]["evidence"] == {}
    assert document["graph"]["mass"] == {"books": [1.0, pytest.approx(np.e)]}
    assert document["graph"]["provenance"] == {"seed": 3}
    assert graph.to_json() == document


@pytest.mark.parametrize(
    ("modules", "tasks", "message"),
    [
        (MODULES[:4], TASKS, "3 tasks over 4 modules do not fit"),
        (MODULES, TASKS[:2], "2 tasks over 5 modules do not fit"),
        (MODULES, None, "5 tasks over 5 modules do not fit"),
        (MODULES, ["books", "films", "ghost"], "'ghost' is not among the modules"),
    ],
)
def test_what_does_not_fit_is_refused(modules, tasks, message):
    R, allocation = learned(0, Knobs())
    with pytest.raises(InvalidGraphError, match=message):
        graph_document(allocation, R, modules, tasks)


@light
@given(seeds, knobs)
def test_what_trains_together_is_exported_as_it_is_weighed(seed, knobs):
    """R_hat and evidence as cotrain holds them: what it weighs with hard gates is what the graph composes."""
    found = Learned(torch.from_numpy(relations(seed)), LAYERS, Settings(knobs=knobs))
    with torch.no_grad():
        found.evidence += torch.randn(found.evidence.shape, generator=torch.Generator().manual_seed(seed))
        found.R_hat += 0.1
    document = graph_document(found.allocation, found.R, MODULES)
    weights = found.weights().detach()
    for t, task in enumerate(MODULES):
        np.testing.assert_allclose(composed(document, task), weights[t].numpy(), atol=1e-5, rtol=1e-4)
