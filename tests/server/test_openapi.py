"""The OpenAPI document says what the server does, and can be read without the network."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

from server import openai_schema, replies_schema
from tests.server.tiny import multipart, peft_files

ASK = {"inputs": [{"task": "books", "text": "a"}], "options": {"explain": True}}
REPLIES: dict[str, tuple[str, str, Any, type[BaseModel]]] = {
    "infer": ("POST", "/v1/infer", ASK, replies_schema.Inferred),
    "infer_brief": ("POST", "/v1/infer", {"inputs": ASK["inputs"]}, replies_schema.Inferred),
    "explain": ("POST", "/v1/explain", ASK, replies_schema.Explained),
    "tasks": ("GET", "/v1/tasks", None, replies_schema.Tasks),
    "task": ("GET", "/v1/tasks/books", None, replies_schema.Task),
    "adapters": ("GET", "/v1/adapters", None, replies_schema.Adapters),
    "adapter": ("GET", "/v1/adapters/books", None, replies_schema.AdapterDetails),
    "version": ("GET", "/v1/adapters/books/versions/1", None, replies_schema.Version),
    "promote": ("PUT", "/v1/adapters/books/aliases/canary", {"version": 1}, replies_schema.Promoted),
    "load": ("POST", "/v1/adapters/books/load", {}, replies_schema.Loaded),
    "unload": ("POST", "/v1/adapters/books/unload", {"version": 1}, replies_schema.Unloaded),
    "load_lora": ("POST", "/v1/load_lora_adapter", {"lora_name": "books"}, replies_schema.Loaded),
    "graph": ("GET", "/v1/graph", None, replies_schema.Graph),
    "put_graph": ("PUT", "/v1/graph", {"nodes": [{"id": "books"}], "edges": []}, replies_schema.GraphReplaced),
    "graph_versions": ("GET", "/v1/graph/versions", None, replies_schema.GraphVersions),
    "models": ("GET", "/v1/models", None, openai_schema.Models),
    "model": ("GET", "/v1/models/books", None, openai_schema.Model),
    "embeddings": ("POST", "/v1/embeddings", {"model": "books", "input": "a"}, openai_schema.Embeddings),
    "health": ("GET", "/health", None, replies_schema.Alive),
    "ready": ("GET", "/ready", None, replies_schema.Ready),
    "unknown": ("GET", "/v1/tasks/nobody", None, replies_schema.Problem),
    "bad_input": ("POST", "/v1/infer", {"inputs": [{"text": "a"}]}, replies_schema.Problem),
    "unknown_model": ("GET", "/v1/models/nobody", None, openai_schema.OpenAIError),
}


def assert_said(found: Any, model: type[BaseModel]) -> None:
    assert model.model_validate(found).model_dump(exclude_unset=True) == found


@pytest.mark.parametrize("case", REPLIES)
def test_a_reply_is_what_the_document_says(client: TestClient, case: str) -> None:
    method, path, body, model = REPLIES[case]

    assert_said(client.request(method, path, json=body).json(), model)


def test_uploads_and_deletions_reply_what_the_document_says(client: TestClient) -> None:
    uploaded = client.post("/v1/adapters", data={"name": "n", "task": "n"}, files=multipart(peft_files(3)))
    deleted = client.delete("/v1/adapters/n/versions/1")

    assert_said(uploaded.json(), replies_schema.Uploaded)
    assert_said(deleted.json(), replies_schema.Deleted)


def test_every_operation_has_a_summary_a_reply_and_its_errors(client: TestClient) -> None:
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            where = f"{method} {path}"
            good = next(one for status, one in operation["responses"].items() if status.startswith("2"))
            assert operation["summary"], where
            assert operation["description"], where
            assert path == "/metrics" or "$ref" in good["content"]["application/json"]["schema"], where
            assert {"400", "401", "403", "404", "413", "422", "429", "500", "503"} <= set(operation["responses"]), where
            refused = operation["responses"]["404"]["content"]
            assert list(refused) == [
                "application/json" if "openai" in operation["tags"] else "application/problem+json"
            ]


def test_the_page_of_the_document_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs").text
    linked = re.findall(r'(?:src|href)="([^"]+)"', page)

    assert client.get("/openapi.json").status_code == 200
    for link in linked:
        assert link.startswith(("/", "data:")), link
        assert link.startswith("data:") or client.get(link).status_code == 200, link
    console = Path(__file__).parents[2] / "server" / "console"
    assert not any("://" in file.read_text().replace("http://www.w3.org", "") for file in console.iterdir())
