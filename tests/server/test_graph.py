"""`/v1/graph`: reading, replacing, versions; and requests that are composed by it meanwhile."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from adapters_store.graph import RelationGraph
from adapters_store.prior import Prior
from adapters_store.store import AdapterStore
from server import inference
from server.schemas import InferRequest
from tests.server.conftest import Serve
from tests.server.tiny import TASKS, multipart, peft_files
from tests.server.tools import held_engine, publish, running, service_of, settings_for, until_async


def document(nodes: Any = TASKS, edges: dict[tuple[str, str], float] | None = None, **attributes: Any) -> dict:
    named = nodes if isinstance(nodes, dict) else dict.fromkeys(nodes)
    return {
        "directed": True,
        "multigraph": False,
        "graph": attributes,
        "nodes": [{"id": task, "adapter": adapter} for task, adapter in named.items()],
        "edges": [{"source": a, "target": b, "weight": w} for (a, b), w in (edges or {}).items()],
    }


def put(client: TestClient, body: Any, if_match: str | None = None) -> Any:
    headers = {"content-type": "application/json"} | ({} if if_match is None else {"if-match": if_match})
    return client.put("/v1/graph", content=json.dumps(body), headers=headers)


def composed_of(client: TestClient, task: str) -> dict[str, float]:
    reply = client.post("/v1/explain", json={"inputs": [{"task": task, "text": "a"}]})
    assert reply.status_code == 200, reply.text
    return {one["name"]: one["weight"] for one in reply.json()["outputs"][0]["composition"]["adapters"]}


def test_what_is_read_can_be_edited_and_put_back_under_its_etag(client: TestClient) -> None:
    read = client.get("/v1/graph")
    edited = read.json()
    edited["edges"].append({"source": "films", "target": "books", "weight": 0.4})

    written = put(client, edited, read.headers["etag"])

    assert written.status_code == 200, written.text
    assert written.json() == {"version": 2, "num_tasks": 3, "num_edges": 4}
    assert written.headers["etag"] == client.get("/v1/graph").headers["etag"] == '"2"'
    assert client.get("/v1/graph?version=1").json() == read.json()
    assert client.get("/v1/graph/versions").json() == {"versions": [1, 2], "current": 2}


def test_the_next_request_is_composed_by_the_new_graph(client: TestClient) -> None:
    before = composed_of(client, "books")

    put(client, document(edges={("books", "spam"): 1.0}))

    assert set(before) == {"books", "films"}
    assert set(composed_of(client, "books")) == {"books", "spam"}


TAGS = {'"1"': 200, "1": 200, "*": 200, 'W/"1"': 200, '"7", "1"': 200, '"2"': 412, '""': 412, "latest": 412}


@pytest.mark.parametrize(("if_match", "status"), TAGS.items())
def test_if_match_decides_between_replaced_and_precondition_failed(
    client: TestClient, if_match: str, status: int
) -> None:
    response = put(client, document(), if_match)

    assert response.status_code == status, response.text
    assert client.get("/v1/graph/versions").json()["current"] == (2 if status == 200 else 1)
    if status == 412:
        assert response.json()["code"] == "precondition_failed"


def test_of_two_editors_of_one_version_the_second_is_told(client: TestClient, store_root: Path) -> None:
    AdapterStore(store_root).publish_graph(document())  # another program, not yet looked at

    response = put(client, document(), '"1"')

    assert (response.status_code, response.json()["code"]) == (412, "precondition_failed")


def test_a_broken_latest_graph_is_replaced_under_the_etag_that_was_fetched(client: TestClient) -> None:
    service = service_of(client)
    before = client.get("/v1/graph")
    service.store.publish_graph(document(evidence={"books": {"films": [1.0]}}))  # one layer; the backbone has two
    client.portal.call(service.refresh)

    read = client.get("/v1/graph")

    assert (read.json(), read.headers["etag"]) == (before.json(), '"2"')
    assert client.get("/v1/graph?version=1").headers["etag"] == '"1"'
    assert put(client, read.json(), before.headers["etag"]).status_code == 412
    written = put(client, read.json(), read.headers["etag"])
    assert (written.status_code, written.json()["version"]) == (200, 3), written.text
    assert client.get("/v1/graph").headers["etag"] == '"3"'


NAN = float("nan")
INVALID = {
    "unknown_node_in_edge": document(edges={("books", "ghost"): 1.0}),
    "nan": document(edges={("books", "films"): NAN}),
    "infinity": document(edges={("books", "films"): float("inf")}),
    "nan_in_a_note": document() | {"nodes": [{"id": "books", "note": NAN}]},
    "node_twice": document() | {"nodes": [{"id": "books"}, {"id": "books"}]},
    "edge_twice": document() | {"edges": [{"source": "books", "target": "films", "weight": 1}] * 2},
    "undirected": document() | {"directed": False},
    "bad_name": document(("../x",)),
    "bad_adapter": document({"books": "/etc/passwd"}),
    "no_nodes": {"edges": []},
    "unknown_key": document() | {"nonsense": 1},
    "bad_knob": document(knobs={"c": 1.5}),
    "evidence_of_three_layers": document(evidence={"books": {"films": [0.0, 1.0, 2.0]}}),
    "evidence_of_none": document(evidence={"books": {"films": []}}),
    "evidence_for_nobody": document(evidence={"books": {"ghost": [0.0, 0.0]}}),
    "evidence_nan": document(evidence={"books": {"films": [NAN, 0.0]}}),
    "mass_of_three_layers": document(mass={"books": [1.0, 1.0, 1.0]}),
    "mass_of_none": document(mass={"books": []}),
    "mass_for_nobody": document(mass={"ghost": [1.0, 1.0]}),
    "mass_negative": document(mass={"books": [1.0, -0.1]}),
    "mass_nan": document(mass={"books": [NAN, 1.0]}),
    "mass_huge": document(mass={"books": [1e5, 1.0]}),
    "unknown_role": document() | {"nodes": [{"id": "books", "role": "expert"}]},
    "unknown_path": document(knobs={"path": "shortest"}),
    "no_paths": document(knobs={"path": "viterbi", "num_paths": 0}),
    "no_utf8": document() | {"nodes": [{"id": "books", "note": "\ud800"}]},
    "no_utf8_in_the_provenance": document(provenance={"x": "\ud800"}),
    "deep": document() | {"nodes": [{"id": "books", "note": json.loads("[" * 400 + "]" * 400)}]},
    "networkx_word_in_a_node": document() | {"nodes": [{"id": "books", "node_for_adding": 1}]},
    "networkx_word_in_an_edge": document()
    | {"edges": [{"source": "books", "target": "films", "weight": 1, "u_of_edge": 1}]},
    "evidence_huge": document(evidence={"books": {"films": [1e300, 0.0]}}),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_graph_is_refused_with_a_reason_and_changes_nothing(client: TestClient, case: str) -> None:
    before = composed_of(client, "books")

    response = put(client, INVALID[case])

    assert (response.status_code, response.json()["code"]) == (422, "invalid_graph"), response.text
    assert len(response.json()["detail"]) > 20
    assert client.get("/v1/graph/versions").json() == {"versions": [1], "current": 1}
    assert composed_of(client, "books") == before


@pytest.mark.parametrize("body", ["[]", '"graph"', "null", "{", "[" * 50_000])
def test_a_body_that_is_no_object_is_refused(client: TestClient, body: str) -> None:
    response = client.put("/v1/graph", content=body, headers={"content-type": "application/json"})

    assert response.status_code in (400, 422)
    assert response.headers["content-type"] == "application/problem+json"


def test_a_graph_from_elsewhere_that_does_not_fit_leaves_the_one_before(serve: Serve, store_root: Path) -> None:
    AdapterStore(store_root).publish_graph(document(evidence={"books": {"films": [1.0]}}))

    client = serve()

    assert client.get("/ready").status_code == 200
    assert "1 layers" in client.get("/ready").json()["refused"]["graph@2"]
    assert composed_of(client, "books") == {"books": 1.0}  # no graph before it, so each task is its own
    assert put(client, document(edges={("books", "spam"): 1.0})).json()["version"] == 3
    assert set(composed_of(client, "books")) == {"books", "spam"}
    assert client.get("/ready").json()["refused"] == {}


def test_evidence_moves_weight_per_layer(client: TestClient) -> None:
    edges = {("books", "films"): 1.0}
    put(client, document(edges=edges, evidence={"books": {"films": [0.0, 5.0], "books": [5.0, 0.0]}}))

    reply = client.post("/v1/explain", json={"inputs": [{"task": "books", "text": "a"}]}).json()
    weights = {one["name"]: one["weights_by_layer"] for one in reply["outputs"][0]["composition"]["adapters"]}

    assert weights["books"][0] > 0.9 > 0.1 > weights["books"][1]
    assert np.sum(list(weights.values()), axis=0) == pytest.approx([1, 1], abs=1e-5)


def test_weights_sum_to_the_mass_that_the_graph_gives(client: TestClient) -> None:
    put(client, document(edges={("books", "films"): 1.0}, mass={"books": [3.0, 0.5]}))

    reply = client.post("/v1/explain", json={"inputs": [{"task": "books", "text": "a"}]}).json()
    adapters = reply["outputs"][0]["composition"]["adapters"]

    assert np.sum([one["weights_by_layer"] for one in adapters], axis=0) == pytest.approx([3, 0.5], abs=1e-5)
    assert client.get("/v1/graph").json()["graph"]["mass"] == {"books": [3.0, 0.5]}


def test_one_best_path_leaves_one_adapter_per_layer(client: TestClient) -> None:
    knobs = {"path": "viterbi", "num_paths": 1, "stay": 0.0}
    evidence = {"books": {"films": [-9.0, 9.0]}}
    put(client, document(edges={("books", "films"): 1.0, ("films", "books"): 1.0}, knobs=knobs, evidence=evidence))

    reply = client.post("/v1/explain", json={"inputs": [{"task": "books", "text": "a"}]}).json()
    weights = {one["name"]: one["weights_by_layer"] for one in reply["outputs"][0]["composition"]["adapters"]}

    assert weights == {"books": [1, 0], "films": [0, 1]}


def with_module(module: str) -> dict:
    """Books leans on a module that is no task."""
    found = document((*TASKS, module), {("books", module): 1.0})
    found["nodes"][-1]["role"] = "module"
    return found


def test_a_shared_module_is_composed_but_is_no_task(client: TestClient) -> None:
    client.post("/v1/adapters", data={"name": "skill", "task": "skill"}, files=multipart(headless(9)))
    assert put(client, with_module("skill")).json()["num_tasks"] == len(TASKS)

    assert set(composed_of(client, "books")) == {"books", "skill"}
    assert client.post("/v1/infer", json={"inputs": [{"task": "books", "text": "a"}]}).status_code == 200
    assert [one["task"] for one in client.get("/v1/tasks").json()["tasks"]] == sorted(TASKS)
    assert "skill" in client.get("/v1/tasks/books").json()["prior"]
    assert client.get("/v1/tasks/skill").status_code == 404
    assert "skill" not in [one["id"] for one in client.get("/v1/models").json()["data"] if one.get("kind") == "task"]


@pytest.mark.parametrize(
    "question",
    [
        {"task": "skill"},
        {"task": "skill", "head": "books"},
        {"tasks": ["books", "skill"]},
        {"mix": {"skill": 0.5, "books": 0.5}, "head": "books"},
    ],
)
@pytest.mark.parametrize("mode", ["prior", "single"])
def test_a_shared_module_asked_for_as_a_task_is_not_found(client: TestClient, question: dict, mode: str) -> None:
    client.post("/v1/adapters", data={"name": "skill", "task": "skill"}, files=multipart(headless(9)))
    put(client, with_module("skill"))

    reply = client.post("/v1/infer", json={"inputs": [question | {"text": "a"}], "options": {"mode": mode}})

    assert (reply.status_code, reply.json()["code"]) == (404, "task_not_found"), reply.text
    assert "'skill' is a module that tasks share" in reply.json()["detail"]


def test_a_shared_module_with_a_head_of_its_own_answers_but_is_not_listed(client: TestClient) -> None:
    put(client, with_module("spam") | {"nodes": [{"id": "books"}, {"id": "films"}, {"id": "spam", "role": "module"}]})

    assert client.post("/v1/infer", json={"inputs": [{"task": "spam", "text": "a"}]}).status_code == 200
    assert [one["task"] for one in client.get("/v1/tasks").json()["tasks"]] == ["books", "films"]


def headless(seed: int) -> dict[str, bytes]:
    return {name: data for name, data in peft_files(seed).items() if not name.startswith("head")}


def test_an_isolated_node_is_composed_of_itself_and_a_cycle_is_fine(client: TestClient) -> None:
    put(client, document(edges={("books", "films"): 1.0, ("films", "books"): 1.0, ("books", "books"): 1.0}))

    assert composed_of(client, "spam") == {"spam": 1.0}
    assert set(composed_of(client, "books")) == {"books", "films"}


def test_a_task_without_an_adapter_is_left_out_until_it_has_one(client: TestClient) -> None:
    edges = {("books", "later"): 1.0, ("books", "films"): 1.0}
    assert put(client, document((*TASKS, "later"), edges)).status_code == 200

    assert set(composed_of(client, "books")) == {"books", "films"}
    missing = client.post("/v1/infer", json={"inputs": [{"task": "later", "text": "a"}]})
    assert (missing.status_code, missing.json()["code"]) == (404, "task_not_found")
    assert "later" not in [one["task"] for one in client.get("/v1/tasks").json()["tasks"]]

    client.post("/v1/adapters", data={"name": "later", "task": "later"}, files=multipart(peft_files(9)))

    assert set(composed_of(client, "books")) == {"books", "films", "later"}


def test_a_node_may_name_a_version_as_its_module(client: TestClient) -> None:
    client.post("/v1/adapters", data={"name": "films", "task": "films"}, files=multipart(peft_files(9)))
    put(client, document({"books": None, "cinema": "films@2"}, {("books", "cinema"): 1.0}))

    reply = client.post("/v1/infer", json={"inputs": [{"task": "cinema", "text": "a"}, {"task": "books", "text": "a"}]})
    outputs = reply.json()["outputs"]

    assert outputs[0]["task"] == "cinema"
    assert set(outputs[0]["scores"]) == {"no", "yes"}
    assert [(one["name"], one["version"]) for one in outputs[0]["composition"]["adapters"]] == [("films", 2)]
    assert ("films", 2) in [(one["name"], one["version"]) for one in outputs[1]["composition"]["adapters"]]


def test_a_node_whose_adapter_is_nowhere_makes_only_itself_unknown(client: TestClient) -> None:
    assert put(client, document({"books": None, "ghost": "nobody@3"}, {("books", "ghost"): 1.0})).status_code == 200

    missing = client.post("/v1/infer", json={"inputs": [{"task": "ghost", "text": "a"}]})
    assert missing.status_code == 404
    assert composed_of(client, "books") == {"books": 1.0}


@pytest.mark.parametrize("version", ["9", "0", "-1", "99999999999999999999", "x"])
def test_a_version_that_is_none_is_a_4xx(client: TestClient, version: str) -> None:
    response = client.get(f"/v1/graph?version={version}")

    assert response.status_code in (404, 422), response.text


def test_a_store_without_a_graph_says_what_to_do(serve: Serve, tmp_path: Path, backbone: Path) -> None:
    publish(tmp_path / "bare", backbone, "books", 1)
    client = serve(store=tmp_path / "bare")

    assert client.get("/v1/graph").json()["code"] == "graph_not_found"
    assert composed_of(client, "books") == {"books": 1.0}
    assert put(client, document(("books",)), '"0"').json()["version"] == 1


def test_what_is_in_flight_finishes_under_the_graph_it_was_admitted_with(backbone: Path, store_root: Path) -> None:
    body = InferRequest.model_validate({"inputs": [{"task": "books", "text": "good"}]})

    async def scenario() -> None:
        async with running(settings_for(backbone, store_root)) as service:
            expected = (await inference.infer(service, body, None))["outputs"]
            with held_engine(service):
                flying = asyncio.ensure_future(inference.infer(service, body, None))
                await until_async(lambda: service.residency.num_held)
                service.store.publish_graph(document(edges={("books", "spam"): 1.0}))
                await service.refresh()
            old, new = (await flying)["outputs"], (await inference.infer(service, body, None))["outputs"]

            assert old == expected
            assert old[0]["composition"]["graph_version"] == 1
            assert new[0]["composition"]["graph_version"] == 2
            assert new[0]["scores"] != old[0]["scores"]

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_prior_row_of_ten_thousand_tasks_takes_under_five_milliseconds() -> None:
    generator = np.random.default_rng(0)
    tasks = [f"t{i}" for i in range(10_000)]
    targets = generator.integers(0, len(tasks), (len(tasks), 50))
    edges = {
        (tasks[i], tasks[j]): float(generator.uniform(0.1, 1))
        for i, row in enumerate(targets)
        for j in set(row.tolist())
    }
    prior = Prior(RelationGraph.of(dict.fromkeys(tasks), edges))
    prior.row("t0")

    times = []
    for task in tasks[1:40]:
        start = time.perf_counter()
        row = prior.row(task)
        times.append(time.perf_counter() - start)
        assert sum(row.values()) == pytest.approx(1)

    assert sorted(times)[len(times) // 2] < 0.005
