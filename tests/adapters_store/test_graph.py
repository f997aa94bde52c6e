"""The relation graph as a document: everything comes back, and what makes no sense is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.errors import InvalidGraphError, TaskNotFoundError
from adapters_store.graph import Knobs, RelationGraph
from adapters_store.prior import Prior
from tests.strategies import light

NAMES = ("books", "films", "skill")
names = st.sampled_from(NAMES)
layers = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4)
masses = st.lists(st.floats(0, 1e4), min_size=1, max_size=4)
knobs = st.fixed_dictionaries(
    {},
    optional={
        "path": st.sampled_from(["none", "marginals", "viterbi"]),
        "stay": st.floats(0, 1),
        "path_strength": st.floats(0, 10),
        "path_threshold": st.floats(0, 1),
        "num_paths": st.integers(1, 64),
        "c": st.floats(0, 0.99),
        "top_k": st.none() | st.integers(1, 9),
    },
)
documents = st.fixed_dictionaries({
    "graph": st.fixed_dictionaries({
        "knobs": knobs,
        "mass": st.dictionaries(names, masses),
        "evidence": st.dictionaries(names, st.dictionaries(names, layers)),
    }),
    "nodes": st.tuples(*(
        st.fixed_dictionaries({"id": st.just(name)}, optional={"role": st.sampled_from(["task", "module"])})
        for name in NAMES
    )).map(list),
    "edges": st.dictionaries(st.tuples(names, names), st.floats(-1, 1)).map(
        lambda found: [{"source": i, "target": j, "weight": w} for (i, j), w in found.items()]
    ),
})  # fmt: skip


@light
@given(documents)
def test_a_graph_comes_back_from_its_json(document):
    graph = RelationGraph.from_json(document)
    written = json.loads(json.dumps(graph.to_json()))
    again = RelationGraph.from_json(written)
    assert again.to_json() == written
    assert again.attributes == graph.attributes
    assert again.nodes == graph.nodes
    assert again.tasks == [node["id"] for node in document["nodes"] if node.get("role") != "module"]


def test_documents_of_before_need_nothing_new():
    graph = RelationGraph.from_json({"nodes": [{"id": "books"}, {"id": "films"}], "edges": []})
    assert graph.tasks == ["books", "films"]
    assert graph.attributes.mass == {}
    assert graph.knobs == Knobs()
    assert (graph.knobs.path, graph.knobs.stay, graph.knobs.path_strength) == ("none", 0.8, 1.0)
    assert (graph.knobs.path_threshold, graph.knobs.num_paths) == (0.05, 1)


def simple(**attributes):
    return {"graph": attributes, "nodes": [{"id": "books"}], "edges": []}


@pytest.mark.parametrize(
    "document",
    [
        simple(mass={"books": [-0.1]}),
        simple(mass={"books": [float("nan")]}),
        simple(mass={"books": [1e5]}),
        simple(mass={"books": []}),
        simple(mass={"ghost": [1.0]}),
        simple(knobs={"path": "shortest"}),
        simple(knobs={"stay": 1.1}),
        simple(knobs={"path_strength": -1}),
        simple(knobs={"path_threshold": 2}),
        simple(knobs={"num_paths": 0}),
        {"nodes": [{"id": "books", "role": "expert"}], "edges": []},
        {"nodes": [{"id": "books", "self": 1}], "edges": []},
        {"nodes": [{"id": "books", "node_for_adding": 1}], "edges": []},
        simple() | {"edges": [{"source": "books", "target": "books", "weight": 1, "u_of_edge": 1}]},
        simple() | {"edges": [{"source": "books", "target": "books", "weight": 1, "v_of_edge": 1}]},
    ],
)
def test_what_makes_no_sense_is_refused(document):
    with pytest.raises(InvalidGraphError):
        RelationGraph.from_json(document)


def test_a_shared_module_takes_part_in_walks_but_is_no_task():
    document = simple() | {
        "nodes": [{"id": "books"}, {"id": "films"}, {"id": "skill", "role": "module"}],
        "edges": [{"source": i, "target": j, "weight": 1.0} for i, j in (("books", "skill"), ("skill", "films"))],
    }
    graph = RelationGraph.from_json(document)
    row = Prior(graph).row("books")
    assert graph.tasks == ["books", "films"]
    assert list(row) == ["books", "skill", "films"]  # through the module to what it leads to
    assert graph.node("skill").role == "module"
    with pytest.raises(TaskNotFoundError):
        graph.node("ghost")


@pytest.mark.parametrize("relations", [{}, {"books": 0.0}, {"books": -1.0, "films": 2.0}, {"books": float("nan")}])
def test_a_task_outside_the_graph_needs_something_to_walk_from(relations):
    prior = Prior(RelationGraph.of({"books": None, "films": None}, {}))
    with pytest.raises(InvalidGraphError, match="one above 0"):
        prior.row_of(relations)
