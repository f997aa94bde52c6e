"""Random bodies: whatever comes, the answer is 200 or a problem with a known code, never a 5xx."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from adapters_store import errors as store
from server import errors
from server.app import make_app
from server.service import Service
from tests.server.tiny import make_store
from tests.server.tools import settings_for
from tests.strategies import light

CODES = {vars(module)[name].code for module in (store, errors) for name in vars(module) if name.endswith("Error")}
CODES |= {"invalid_request", "bad_json", "bad_request"}

number = st.one_of(
    st.floats(),
    st.floats(-2, 2),
    st.integers(-3, 3),
    st.sampled_from([0, -0.0, 1e308, -1e308, 5e-324, 1e38, 10**400, True]),
)
text = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["good book", "", " ", "\x00", "word1 " * 99, "\ud800", "[CLS] [PAD]", "é\u0301\u202e", "🧨"]),
)
task = st.sampled_from(["books", "films", "spam", "books", "nobody", "", "../x", "books@1", "A", "\ud800"])
reference = st.sampled_from(
    ["books", "films@1", "spam@prod", "books@latest", "books@9", "x", "@", "books@", "books@sha256:00"]
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), number, text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=6,
)
weight = st.one_of(number, st.lists(number, min_size=2, max_size=2), st.lists(number, max_size=3))
valid = st.one_of(
    st.fixed_dictionaries({"text": text, "task": task}, optional={"head": reference}),
    st.fixed_dictionaries({"text": text, "tasks": st.lists(task, max_size=3)}),
    st.fixed_dictionaries({"text": text, "mix": st.dictionaries(task, number, max_size=3), "head": reference}),
    st.fixed_dictionaries(
        {"text": text, "adapters": st.dictionaries(reference, weight, max_size=3), "head": reference}
    ),
)
odd = st.dictionaries(
    st.one_of(st.sampled_from(["text", "task", "tasks", "mix", "adapters", "head"]), text), anything, max_size=4
)
options = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.sampled_from(["prior", "single", "explicit", "none", "x", None]),
        "top_k": st.one_of(st.integers(-1, 300), anything),
        "temperature": st.one_of(number, st.sampled_from([1e-3, 1e6, 1e-9])),
        "threshold": number,
        "explain": st.booleans(),
        "typo": anything,
    },
)
bodies = st.one_of(
    st.fixed_dictionaries({"inputs": st.lists(valid, min_size=1, max_size=3)}, optional={"options": options}),
    st.fixed_dictionaries({"inputs": st.lists(st.one_of(valid, odd), max_size=3)}, optional={"options": options}),
    anything,
)


@pytest.fixture(scope="module")
def server(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    root = tmp_path_factory.mktemp("fuzz")
    made = make_store(root / "store", backbone)
    number, graph = made.graph()
    graph["graph"]["evidence"] = {"books": {"films": [3.0, -900.0]}}
    made.publish_graph(graph, expected_version=number)
    with TestClient(make_app(Service(settings_for(backbone, root / "store"))), raise_server_exceptions=False) as client:
        yield client


def refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def assert_answer_or_problem(server: TestClient, path: str, content: bytes) -> None:
    response = server.post(path, content=content, headers={"content-type": "application/json"})

    found = json.loads(response.content, parse_constant=refuse_constant)
    assert response.status_code < 500, found
    if response.status_code != 200:
        assert response.headers["content-type"] == "application/problem+json"
        assert found["code"] in CODES, found
        assert found["request_id"] == response.headers["x-request-id"]


@given(body=bodies)
@light
def test_infer_and_explain_never_fail(server: TestClient, body: Any) -> None:
    for path in ("/v1/infer", "/v1/explain"):
        assert_answer_or_problem(server, path, json.dumps(body).encode())


@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
@light
def test_bytes_that_are_no_json_never_fail(server: TestClient, content: bytes) -> None:
    assert_answer_or_problem(server, "/v1/infer", content)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"inputs":' * 20_000, b'{"inputs": [' + b"{}," * 5000 + b"{}]}", b"\xff", b"", b"9" * 5000,
     b'{"inputs": [{"task": "books", "text": "\\ud800"}]}', b'{"\\ud800": 1}', b'{"inputs": NaN}'],
    ids=range(9),
)  # fmt: skip
def test_hostile_json_never_fails(server: TestClient, content: bytes) -> None:
    assert_answer_or_problem(server, "/v1/infer", content)
