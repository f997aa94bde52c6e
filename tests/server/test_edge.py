"""The outermost layer: request ids, sizes of bodies and headers, other sites' pages, and what nobody foresaw."""

import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.conftest import Serve
from tests.server.test_security import make_key
from tests.server.tiny import multipart, peft_files
from tests.server.tools import address, live, read_all, settings_for


@pytest.mark.parametrize("hostile", ["a b", "x" * 129, "é", "a\tb", "<script>", "../../etc", "", "a;b", "{}"])
def test_a_hostile_request_id_is_replaced(client: TestClient, hostile: str) -> None:
    response = client.get("/v1/tasks", headers={"x-request-id": hostile.encode("latin-1")})

    assert response.headers["x-request-id"] != hostile
    assert len(response.headers["x-request-id"]) == 32


def test_a_harmless_request_id_comes_back_in_answers_and_errors(client: TestClient) -> None:
    headers = {"x-request-id": "Trace-1.b_2"}

    assert client.get("/health", headers=headers).headers["x-request-id"] == "Trace-1.b_2"
    assert client.get("/v1/tasks/none", headers=headers).json()["request_id"] == "Trace-1.b_2"


@pytest.mark.parametrize("path", ["/v1/infer", "/v1/embeddings"])
def test_a_json_body_over_the_limit_is_413(client: TestClient, path: str) -> None:
    response = client.post(path, content=b" " * (17 * 2**20), headers={"content-type": "application/json"})

    assert response.status_code == 413
    found = response.json()
    assert found.get("code", found.get("error", {}).get("code")) == "too_large"


def test_headers_over_the_limit_are_431(client: TestClient) -> None:
    response = client.get("/v1/tasks", headers={"x-noise": "n" * 70_000})

    assert (response.status_code, response.json()["code"]) == (431, "headers_too_large")


def test_headers_without_end_are_cut_off(backbone: Path, store_root: Path) -> None:
    answer = b""
    settings = settings_for(backbone, store_root, preload=False)
    with live(settings) as (url, _), socket.create_connection(address(url), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nx-noise: ")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(64):
                connection.sendall(b"n" * 65536)
            connection.sendall(b"\r\n\r\n")
            answer = connection.recv(100)

    assert b"HTTP/1.1 200" not in answer


def _pour(connection: socket.socket, piece: bytes) -> None:
    """The piece again and again, 16 MB in all: more than the sockets on the way can hold."""
    for _ in range(2**24 // len(piece)):
        connection.sendall(piece)


@pytest.mark.parametrize(
    ("path", "piece"),
    [("/v1/infer", b"a:" + b"b" * 996 + b"\r\n"), ("/v1/nonsense", b"b" * 1000)],
    ids=["many, request unanswered", "one, request answered"],
)
def test_trailers_without_end_are_cut_off(backbone: Path, store_root: Path, path: str, piece: bytes) -> None:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    settings = settings_for(backbone, store_root, preload=False)
    with live(settings) as (url, _), socket.create_connection(address(url), timeout=60) as connection:
        connection.sendall(head.encode() + b"0\r\n")
        if path == "/v1/nonsense":
            assert connection.recv(100).startswith(b"HTTP/1.1 404")
            connection.sendall(b"a:")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            _pour(connection, piece)


def test_trailers_are_dropped_and_a_long_body_of_small_chunks_is_read(backbone: Path, store_root: Path) -> None:
    body = json.dumps({"inputs": [{"task": "books", "text": "good " * 20_000}]}).encode()
    chunks = b"".join(b"1\r\n" + body[i : i + 1] + b"\r\n" for i in range(len(body)))
    head = b"POST /v1/infer HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    settings = settings_for(backbone, store_root, preload=False)
    with live(settings) as (url, _), socket.create_connection(address(url), timeout=60) as connection:
        connection.sendall(
            head + chunks + b"0\r\nx-request-id: late\r\n\r\nGET /health HTTP/1.1\r\nconnection: close\r\n\r\n"
        )
        answers = read_all(connection)

    assert answers.count(b"HTTP/1.1 200") == 2
    assert b"late" not in answers


OWN = {"origin": "http://testserver"}
FOREIGN = [
    {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
    {"origin": "http://testserver:81", "sec-fetch-site": "same-site"},
    {"origin": "https://evil.example"},
    {"origin": "http://testserver:81"},
    {"origin": "null"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_page_of_another_site_changes_and_asks_nothing_without_keys(client: TestClient, headers: dict) -> None:
    files = multipart(peft_files(7))
    published = client.post("/v1/adapters", data={"name": "new", "task": "new"}, files=files, headers=headers)
    asked = client.post("/v1/embeddings", json={"model": "books", "input": "good"}, headers=headers)
    deleted = client.delete("/v1/adapters/books/versions/1", headers=headers)

    assert [one.status_code for one in (published, asked, deleted)] == [403, 403, 403]
    assert published.json()["code"] == asked.json()["error"]["code"] == "forbidden"
    assert "--api-keys" in published.json()["detail"]
    assert client.get("/v1/adapters/new").status_code == 404
    assert client.get("/v1/adapters/books", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, OWN, OWN | {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}], ids=str
)
def test_own_pages_and_programs_need_no_keys(client: TestClient, headers: dict) -> None:
    files = multipart(peft_files(7))
    published = client.post("/v1/adapters", data={"name": "new", "task": "new"}, files=files, headers=headers)

    assert published.status_code == 201, published.text


def test_a_page_of_another_site_that_has_a_key_may_ask(serve: Serve, tmp_path: Path) -> None:
    key = make_key(tmp_path / "keys.json", "web")
    client = serve(api_keys=tmp_path / "keys.json")

    body = {"inputs": [{"task": "books", "text": "good"}]}

    assert client.post("/v1/infer", json=body, headers=FOREIGN[0] | key).status_code == 200


def test_an_unforeseen_error_is_a_500_with_the_id_and_its_trace_in_the_log_without_the_text(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("".join(["sec", "ret"]))

    client.app.state.service.composer.compose = broken
    body = {"inputs": [{"task": "books", "text": "good"}]}
    response = client.post("/v1/infer", json=body, headers={"x-request-id": "find-me"})

    logged = json.dumps([vars(record) for record in caplog.records], default=str)
    assert (response.status_code, response.json()["code"]) == (500, "internal")
    assert response.headers["x-request-id"] == response.json()["request_id"] == "find-me"
    assert "find-me" in logged
    assert "KeyError" in logged
    assert "in broken" in logged
    assert "secret" not in logged
    assert "secret" not in response.text
