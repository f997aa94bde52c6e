"""`/v1/infer` and `/v1/explain`: what comes back, in what order, composed of what."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from adapters_store.graph import RelationGraph
from adapters_store.prior import Prior
from adapters_store.store import AdapterStore
from tests.server.conftest import Serve
from tests.server.tiny import TASKS


def ask(client: TestClient, *inputs: dict, **options: object) -> dict:
    response = client.post("/v1/infer", json={"inputs": list(inputs), "options": options})
    assert response.status_code == 200, response.text
    return response.json()


def test_an_answer_has_label_scores_and_the_composition_that_gave_it(client: TestClient) -> None:
    output = ask(client, {"task": "books", "text": "good book"})["outputs"][0]

    assert output["task"] == "books"
    assert output["label"] == max(output["scores"], key=output["scores"].get)
    assert sum(output["scores"].values()) == pytest.approx(1, abs=1e-5)
    adapters = output["composition"]["adapters"]
    assert {"name", "version", "digest", "weight"} == set(adapters[0])
    assert adapters[0]["digest"].startswith("sha256:")
    assert sum(one["weight"] for one in adapters) == pytest.approx(1, abs=1e-5)


def test_default_composition_is_the_prior_row_of_the_graph(client: TestClient, store_root: Path) -> None:
    graph = RelationGraph.from_json(AdapterStore(store_root).graph()[1])
    row = Prior(graph).row("books")

    adapters = ask(client, {"task": "books", "text": "good"})["outputs"][0]["composition"]["adapters"]

    gated = {task: weight for task, weight in row.items() if weight >= graph.knobs.threshold * max(row.values())}
    expected = {task: weight / sum(gated.values()) for task, weight in gated.items()}
    assert {one["name"]: one["weight"] for one in adapters} == pytest.approx(expected, abs=1e-5)


def test_outputs_come_in_the_order_of_inputs_and_of_tasks(client: TestClient) -> None:
    reply = ask(
        client,
        {"task": "spam", "text": "a"},
        {"tasks": ["films", "books"], "text": "b"},
        {"task": "books", "text": "c"},
    )

    assert [output["task"] for output in reply["outputs"]] == ["spam", "films", "books", "books"]


@pytest.mark.parametrize("mode", ["prior", "single", "none"])
def test_many_inputs_in_one_call_answer_as_single_calls(client: TestClient, mode: str) -> None:
    inputs = [{"task": TASKS[i % 3], "text": " ".join(["good", "bad", "word7"] * (1 + i % 5))} for i in range(24)]

    together = ask(client, *inputs, mode=mode)["outputs"]

    for one, output in zip(inputs, together, strict=True):
        alone = ask(client, one, mode=mode)["outputs"][0]
        assert alone["label"] == output["label"]
        assert alone["scores"] == pytest.approx(output["scores"], abs=2e-6)


def test_single_mode_uses_the_tasks_own_adapter_and_none_uses_nothing(client: TestClient) -> None:
    single = ask(client, {"task": "books", "text": "good"}, mode="single")["outputs"][0]["composition"]
    none = ask(client, {"task": "books", "text": "good"}, mode="none")["outputs"][0]["composition"]

    assert [(one["name"], one["weight"]) for one in single["adapters"]] == [("books", 1.0)]
    assert none["adapters"] == []


def test_explicit_weights_are_taken_as_given(client: TestClient) -> None:
    text = {"text": "good film", "head": "books"}
    one_hot = ask(client, text | {"adapters": {"books@1": 1.0}})["outputs"][0]
    single = ask(client, {"task": "books", "text": "good film"}, mode="single")["outputs"][0]
    zero = ask(client, text | {"adapters": {"books@1": 0.0}})["outputs"][0]
    bare = ask(client, {"task": "books", "text": "good film"}, mode="none")["outputs"][0]
    layers = ask(client, text | {"adapters": {"books": [1.0, 0.0], "films@prod": [0.0, -0.5]}}, explain=True)[
        "outputs"
    ][0]

    assert one_hot["scores"] == single["scores"]
    assert zero["scores"] == bare["scores"]
    assert [one["weights_by_layer"] for one in layers["composition"]["adapters"]] == [[1.0, 0.0], [0.0, -0.5]]


def test_a_mix_of_one_task_is_that_task(client: TestClient) -> None:
    mixed = ask(client, {"mix": {"books": 3.0}, "head": "books", "text": "good"})["outputs"][0]
    plain = ask(client, {"task": "books", "text": "good"})["outputs"][0]

    assert mixed["scores"] == pytest.approx(plain["scores"], abs=2e-6)


def test_options_narrow_the_composition(client: TestClient) -> None:
    wide = ask(client, {"task": "spam", "text": "a"})["outputs"][0]["composition"]["adapters"]
    narrow = ask(client, {"task": "spam", "text": "a"}, top_k=1)["outputs"][0]["composition"]["adapters"]
    gated = ask(client, {"task": "spam", "text": "a"}, threshold=1.0)["outputs"][0]["composition"]["adapters"]

    assert len(wide) > len(narrow) == len(gated) == 1


def test_explain_gives_the_composition_without_running_it(client: TestClient) -> None:
    body = {"inputs": [{"task": "books", "text": "good"}]}

    explained = client.post("/v1/explain", json=body).json()
    answered = client.post("/v1/infer", json=body | {"options": {"explain": True}}).json()

    assert explained["outputs"][0]["composition"] == answered["outputs"][0]["composition"]
    assert all(len(one["weights_by_layer"]) == 2 for one in explained["outputs"][0]["composition"]["adapters"])


@pytest.mark.parametrize(
    ("one", "status", "code"),
    [
        ({"task": "nope", "text": "a"}, 404, "task_not_found"),
        ({"tasks": ["books", "nope"], "text": "a"}, 404, "task_not_found"),
        ({"adapters": {"books@9": 1.0}, "head": "books", "text": "a"}, 404, "adapter_not_found"),
        ({"adapters": {"../etc": 1.0}, "head": "books", "text": "a"}, 422, "invalid_name"),
        ({"adapters": {"books": [1.0]}, "head": "books", "text": "a"}, 422, "invalid_composition"),
        ({"adapters": {"books": 1.0}, "text": "a"}, 422, "no_head"),
        ({"mix": {"books": -1.0}, "head": "books", "text": "a"}, 422, "invalid_composition"),
        ({"task": "books", "text": "a", "typo": 1}, 422, "invalid_request"),
        ({"task": "books"}, 422, "invalid_request"),
        ({"text": "a"}, 422, "invalid_request"),
    ],
)
def test_one_bad_input_refuses_the_call_and_is_named(client: TestClient, one: dict, status: int, code: str) -> None:
    response = client.post("/v1/infer", json={"inputs": [{"task": "books", "text": "fine"}, one]})

    problem = response.json()
    assert (response.status_code, problem["code"], problem["index"]) == (status, code, 1)
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["request_id"] == response.headers["x-request-id"]


def test_a_body_that_is_no_json_is_a_400(client: TestClient) -> None:
    response = client.post("/v1/infer", content=b"{nope", headers={"content-type": "application/json"})

    assert (response.status_code, response.json()["code"]) == (400, "bad_json")


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded"])
def test_json_sent_as_something_else_is_a_415_that_says_what_to_do(client: TestClient, media: str) -> None:
    body = b'{"inputs": [{"task": "books", "text": "a"}]}'

    response = client.post("/v1/infer", content=body, headers={"content-type": media})

    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")
    assert "application/json" in response.json()["detail"]


def test_64_inputs_of_16_tasks_and_64_compositions_run_in_one_forward(
    serve: Serve, tmp_path: Path, backbone: Path
) -> None:
    from tests.server.tiny import make_store

    tasks = [f"task{i}" for i in range(16)]
    make_store(tmp_path / "many", backbone, tasks)
    client = serve(store=tmp_path / "many", batch_tokens=2048)
    inputs = [
        {
            "adapters": {tasks[i % 16]: 0.5 + i / 64, tasks[(i * 7 + 3) % 16]: i / 64},
            "head": tasks[i % 16],
            "text": f"word{i} good",
        }
        for i in range(64)
    ]
    before = _forwards(client)

    together = ask(client, *inputs)

    assert _forwards(client) == before + 1
    assert 'espalier_batch_compositions_bucket{le="64.0"}' in client.get("/metrics").text
    for one, output in zip(inputs, together["outputs"], strict=True):
        assert ask(client, one)["outputs"][0]["scores"] == pytest.approx(output["scores"], abs=2e-6)


def _forwards(client: TestClient) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("espalier_forwards_total")))
