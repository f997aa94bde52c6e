"""Keys, scopes, tasks, limits: who may do what, and what nobody may send."""

from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Mount
from starlette.testclient import TestClient
from typer.testing import CliRunner

from server import keys
from server.edge import PUBLIC
from server.security import KeyFile
from server.serve import serve
from tests.server.conftest import Serve
from tests.server.tiny import multipart, peft_files


def make_key(file: Path, name: str, *options: str) -> dict[str, str]:
    """A new key as a header."""
    done = CliRunner().invoke(_cli(), [name, "--file", str(file), *options])
    assert done.exit_code == 0, done.output
    return {"authorization": f"Bearer {done.output.strip()}"}


def _cli() -> Any:
    import typer

    app = typer.Typer()
    app.command()(keys.make)
    return app


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def admin(key_file: Path) -> dict[str, str]:
    return make_key(key_file, "ops", "--scope", "infer", "--scope", "admin")


@pytest.fixture
def web(key_file: Path) -> dict[str, str]:
    return make_key(key_file, "web")


@pytest.fixture
def shop(key_file: Path) -> dict[str, str]:
    return make_key(key_file, "shop", "--task", "books")


@pytest.fixture
def guarded(serve: Serve, key_file: Path, admin: dict, web: dict, shop: dict) -> TestClient:
    return serve(api_keys=key_file)


def infer(client: TestClient, key: dict[str, str], one: dict, **options: Any) -> Any:
    body = {"inputs": [{"text": "good"} | one], "options": options}
    return client.post("/v1/infer", json=body, headers=key)


def routes(app: Any) -> list[tuple[str, str]]:
    """(method, path) of every route, placeholders filled in."""
    found = []
    for path, methods in app.openapi()["paths"].items():
        found += [(method.upper(), path) for method in methods]
    others = [route for route in app.routes if not isinstance(route, Mount) and hasattr(route, "methods")]
    found += [(method, route.path) for route in others for method in route.methods or ()]
    filled = {"{version}": "1", "{name}": "books", "{alias}": "prod", "{task}": "books", "{name:path}": "books"}
    for mark, value in filled.items():
        found = [(method, path.replace(mark, value)) for method, path in found]
    return sorted(set(found))


def test_without_a_key_every_route_is_401_but_the_public_ones(guarded: TestClient) -> None:
    walked = routes(guarded.app)
    assert len(walked) > 20

    for method, path in [*walked, ("GET", "/metrics"), ("GET", "/v1/nonsense"), ("POST", "/v1/infer/"), ("PUT", "/x")]:
        response = guarded.request(method, path, follow_redirects=False)
        assert (response.status_code == 401) != (path in PUBLIC), (method, path, response.status_code)
        if response.status_code == 401:
            assert response.headers["www-authenticate"] == "Bearer"
            assert "x-request-id" in response.headers


@pytest.mark.parametrize("path", sorted(PUBLIC))
def test_public_paths_answer_without_a_key_and_tell_no_names(guarded: TestClient, path: str) -> None:
    response = guarded.get(path)

    assert response.status_code == 200
    if path != "/openapi.json":
        assert "films" not in response.text


def test_ready_tells_more_to_a_key(guarded: TestClient, web: dict) -> None:
    assert guarded.get("/ready").json() == {"ready": True, "reason": None}
    assert guarded.get("/ready", headers=web).json()["refused"] == {}


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic abc", "Bearer \xff\xfe", "bearer  x y"]
)
def test_an_authorization_that_is_no_known_key_is_401(guarded: TestClient, header: str) -> None:
    response = guarded.get("/v1/tasks", headers={"authorization": header.encode("latin-1")})

    assert (response.status_code, response.json()["code"]) == (401, "unauthorized")


def test_errors_of_keys_on_openai_routes_are_openais_objects(guarded: TestClient, web: dict) -> None:
    response = guarded.post("/v1/embeddings", json={"model": "books", "input": "a"})

    assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")


def test_an_infer_key_reads_and_infers_and_changes_nothing(guarded: TestClient, web: dict, store_root: Path) -> None:
    before = sorted(path for path in store_root.rglob("*") if path.is_file())

    assert infer(guarded, web, {"task": "books"}).status_code == 200
    for path in ("/metrics", "/v1/tasks", "/v1/adapters", "/v1/graph", "/v1/models"):
        assert guarded.get(path, headers=web).status_code == 200
    changes = [("POST", "/v1/adapters"), ("PUT", "/v1/adapters/books/aliases/prod"), ("PUT", "/v1/graph"),
               ("DELETE", "/v1/adapters/books/versions/1"), ("POST", "/v1/adapters/books/load"),
               ("POST", "/v1/adapters/books/unload"), ("POST", "/v1/load_lora_adapter")]  # fmt: skip
    for method, path in changes:
        response = guarded.request(method, path, headers=web)
        assert (response.status_code, response.json()["code"]) == (403, "forbidden"), path
    assert sorted(path for path in store_root.rglob("*") if path.is_file()) == before


def test_an_admin_key_may_upload(guarded: TestClient, admin: dict) -> None:
    files = multipart(peft_files(7))
    response = guarded.post("/v1/adapters", data={"name": "new", "task": "new"}, files=files, headers=admin)

    assert response.status_code == 201, response.text
    assert response.json()["manifest"]["provenance"]["uploaded_by"] == "ops"


@pytest.mark.parametrize(
    "one",
    [
        {"task": "films"},
        {"tasks": ["books", "films"]},
        {"task": "books", "head": "films"},
        {"mix": {"books": 0.5, "films": 0.5}, "head": "books"},
        {"adapters": {"films": 1.0}, "head": "books"},
        {"adapters": {"books": 1.0}, "head": "films@1"},
    ],
)
def test_a_key_for_some_tasks_is_refused_on_others(guarded: TestClient, shop: dict, one: dict) -> None:
    for path in ("/v1/infer", "/v1/explain"):
        response = guarded.post(path, json={"inputs": [one | {"text": "a"}]}, headers=shop)
        assert (response.status_code, response.json()["code"]) == (403, "forbidden"), response.text
        assert response.json()["index"] == 0


def test_a_key_for_some_tasks_is_answered_on_its_own_with_the_whole_composition(
    guarded: TestClient, shop: dict
) -> None:
    response = infer(guarded, shop, {"task": "books"})
    explicit = infer(guarded, shop, {"adapters": {"books@1": 1.0}, "head": "books"})

    assert {one["name"] for one in response.json()["outputs"][0]["composition"]["adapters"]} == {"books", "films"}
    assert explicit.status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "books"}, 200),
        ({"model": "backbone0"}, 200),
        ({"model": "films"}, 403),
        ({"model": "films@1"}, 403),
        ({"model": "books", "espalier": {"adapters": {"films": 1.0}}}, 403),
        ({"model": "books", "espalier": {"mix": {"films": 1.0}}}, 403),
    ],
)
def test_embeddings_keep_to_the_keys_tasks(guarded: TestClient, shop: dict, body: dict, status: int) -> None:
    if body["model"] == "backbone0":
        body = body | {"model": guarded.get("/v1/models", headers=shop).json()["data"][0]["id"]}

    response = guarded.post("/v1/embeddings", json=body | {"input": "a"}, headers=shop)

    assert response.status_code == status, response.text


def test_lists_show_a_key_only_its_tasks(guarded: TestClient, shop: dict) -> None:
    def names(path: str, field: str, key: str) -> list[str]:
        return [one[key] for one in guarded.get(path, headers=shop).json()[field]]

    assert names("/v1/tasks", "tasks", "task") == ["books"]
    assert names("/v1/adapters", "adapters", "name") == ["books"]
    assert names("/v1/models", "data", "id")[1:] == ["books"]
    for path in ("/v1/tasks/films", "/v1/adapters/films", "/v1/adapters/films/versions/1", "/v1/models/films"):
        response = guarded.get(path, headers=shop)
        assert response.status_code == 404, path
        assert "spam" not in response.text
    assert guarded.get("/v1/graph", headers=shop).status_code == 403


def test_an_admin_of_some_tasks_administers_only_those(serve: Serve, key_file: Path) -> None:
    own = make_key(key_file, "books-admin", "--scope", "admin", "--scope", "infer", "--task", "books")
    client = serve(api_keys=key_file)
    files = multipart(peft_files(7))

    def upload(name: str, task: str) -> int:
        return client.post("/v1/adapters", data={"name": name, "task": task}, files=files, headers=own).status_code

    assert upload("films", "films") == upload("films", "books") == upload("new", "films") == 403
    assert upload("books", "books") == 201
    assert client.put("/v1/adapters/films/aliases/prod", json={"version": 1}, headers=own).status_code == 404
    assert client.delete("/v1/adapters/films/versions/1", headers=own).status_code == 404
    assert client.post("/v1/adapters/films/unload", headers=own).status_code == 404
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "films"}, headers=own).status_code == 404
    assert client.put("/v1/graph", json={}, headers=own).status_code == 403
    assert client.put("/v1/adapters/books/aliases/prod", json={"version": 2}, headers=own).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.0.2.1", "::"])
def test_without_keys_only_loopback_is_served(host: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        serve(["--host", host, "--store", str(tmp_path)])

    assert stopped.value.code == 2
    assert "--api-keys" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", '{"keys": []}', '{"keys": [{"name": "a", "sha256": "short"}]}', None])
def test_a_key_file_that_is_none_stops_the_server_and_says_why(
    key_file: Path, content: str | None, serve: Serve
) -> None:
    if content is not None:
        key_file.write_text(content)

    with pytest.raises(ValueError, match="--api-keys"):
        serve(api_keys=key_file)


def test_a_made_key_is_kept_as_a_hash_for_its_owner_only(key_file: Path) -> None:
    first = make_key(key_file, "one", "--task", "books")["authorization"].removeprefix("Bearer ")
    make_key(key_file, "two", "--scope", "admin")

    assert first.startswith("esp-")
    assert len(first) > 40
    assert first not in key_file.read_text()
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert [key.name for key in KeyFile.model_validate_json(key_file.read_text()).keys] == ["one", "two"]


def test_a_scope_that_is_none_makes_no_key(key_file: Path) -> None:
    done = CliRunner().invoke(_cli(), ["x", "--file", str(key_file), "--scope", "root"])

    assert done.exit_code != 0
    assert not key_file.exists()
