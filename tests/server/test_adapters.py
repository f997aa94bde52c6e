"""Uploading, versions, aliases, residency, deletion: what a client may do while the server serves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from starlette.testclient import TestClient

from adapters_store import exchange
from adapters_store.store import AdapterStore
from tests.server.conftest import Serve
from tests.server.tiny import make_adapter, make_backbone, make_store, multipart, peft_files


def upload(client: TestClient, name: str, files: dict[str, bytes], **fields: str) -> Any:
    return client.post("/v1/adapters", data={"name": name, "task": name} | fields, files=multipart(files))


def scores(client: TestClient, one: dict, mode: str = "single") -> dict[str, float]:
    response = client.post("/v1/infer", json={"inputs": [one], "options": {} if "adapters" in one else {"mode": mode}})
    assert response.status_code == 200, response.text
    return response.json()["outputs"][0]["scores"]


def exported(store_root: Path, reference: str, folder: Path) -> dict[str, bytes]:
    store = AdapterStore(store_root)
    manifest = store.resolve(reference)
    exchange.write_folder(folder, manifest, store.load(manifest))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_peft_upload_answers_at_once_under_its_own_task(client: TestClient) -> None:
    response = upload(client, "fresh", peft_files(7))

    body = response.json()
    assert response.status_code == 201, body
    assert body["reference"] == "fresh@1"
    assert body["coverage"]["num_sites"] == 4
    assert set(scores(client, {"task": "fresh", "text": "good"})) == {"no", "yes"}


def test_our_own_format_round_trips_through_an_upload(client: TestClient, store_root: Path, tmp_path: Path) -> None:
    files = exported(store_root, "books@1", tmp_path / "out")

    response = upload(client, "copy", files)

    assert response.status_code == 201, response.text
    assert response.json()["digest"] == AdapterStore(store_root).resolve("books@1").digest
    assert scores(client, {"task": "copy", "text": "bad"}) == scores(client, {"task": "books", "text": "bad"})


def test_promote_and_roll_back_change_what_the_task_answers_with(client: TestClient) -> None:
    first = scores(client, {"task": "books", "text": "good"})
    assert upload(client, "books", peft_files(11)).json()["reference"] == "books@2"
    assert scores(client, {"task": "books", "text": "good"}) == first

    promoted = client.put("/v1/adapters/books/aliases/prod", json={"version": 2})
    second = scores(client, {"task": "books", "text": "good"})
    client.put("/v1/adapters/books/aliases/prod", json={"version": 1})

    assert promoted.json()["version"] == 2
    assert second != first
    assert scores(client, {"task": "books", "text": "good"}) == first


def test_unload_frees_the_slot_and_the_next_request_loads_again(client: TestClient) -> None:
    before = scores(client, {"task": "books", "text": "good"})

    gone = client.post("/v1/adapters/books/unload").json()
    state = client.get("/v1/adapters/books/versions/1").json()["state"]

    assert gone == {"name": "books", "unloaded": [1]}
    assert state == "store"
    assert scores(client, {"task": "books", "text": "good"}) == before
    assert client.get("/v1/adapters/books").json()["resident"] == [1]


def test_delete_takes_a_version_away_but_not_while_an_alias_points_at_it(client: TestClient) -> None:
    upload(client, "books", peft_files(11))

    refused = client.delete("/v1/adapters/books/versions/1")
    deleted = client.delete("/v1/adapters/books/versions/2")

    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert deleted.status_code == 200
    assert client.get("/v1/adapters/books/versions/2").status_code == 404
    assert upload(client, "books", peft_files(12)).json()["reference"] == "books@3"


def test_vllms_endpoints_take_store_references_and_never_paths(client: TestClient) -> None:
    loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "films", "lora_path": "films@1"})
    hostile = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/etc/passwd"})
    unloaded = client.post("/v1/unload_lora_adapter", json={"lora_name": "films@1"})

    assert loaded.json()["state"] == "device"
    assert (hostile.status_code, hostile.json()["code"]) == (422, "invalid_name")
    assert unloaded.json()["unloaded"] == [1]


def broken(**changes: Any) -> dict[str, bytes]:
    files = peft_files(5) | {name.replace("__", "."): data for name, data in changes.items()}
    return {name: data for name, data in files.items() if data is not None}


def tensors_with(change: Any) -> bytes:
    tensors = load(peft_files(5)["adapter_model.safetensors"])
    change(tensors)
    return save(tensors)


def _poison(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def _clear(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name].zero_()


def _widen(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        if "lora_A" in name:
            tensors[name] = torch.ones(3, 40)


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("encoder.layer", "decoder.block")] = tensors.pop(name)


def _halve(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors)[::2]:
        del tensors[name]


CONFIG = json.loads(peft_files(5)["adapter_config.json"])
BAD_PEFT = {
    "not_finite": ({"adapter_model.safetensors": tensors_with(_poison)}, "not_finite"),
    "all_zero": ({"adapter_model.safetensors": tensors_with(_clear)}, "all_zero"),
    "wrong_width": ({"adapter_model.safetensors": tensors_with(_widen)}, "wrong_shape"),
    "unknown_modules": ({"adapter_model.safetensors": tensors_with(_rename)}, "no_site"),
    "half_the_keys": ({"adapter_model.safetensors": tensors_with(_halve)}, "keys_mismatch"),
    "pickle": ({"adapter_model.safetensors": b"\x80\x04\x95junk"}, "bad_format"),
    "zip": ({"adapter_model.safetensors": b"PK\x03\x04junk"}, "bad_format"),
    "truncated": ({"adapter_model.safetensors": peft_files(5)["adapter_model.safetensors"][:-9]}, "bad_format"),
    "regex_targets": (
        {"adapter_config.json": json.dumps(CONFIG | {"target_modules": "(a+)+$"}).encode()},
        "unsupported",
    ),
    "dora": ({"adapter_config.json": json.dumps(CONFIG | {"use_dora": True}).encode()}, "unsupported"),
    "huge_r": ({"adapter_config.json": json.dumps(CONFIG | {"r": 10_000_000}).encode()}, "wrong_shape"),
    "config_no_json": ({"adapter_config.json": b"{"}, "bad_format"),
    "labels": ({"head.json": b'{"labels": ["a", "b", "c"]}'}, "labels_mismatch"),
    "golden": ({"examples.jsonl": b'{"text": "good", "logits": [40, -40]}'}, "golden_mismatch"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PEFT)
def test_a_bad_upload_is_refused_by_name_and_leaves_nothing_behind(
    client: TestClient, store_root: Path, case: str
) -> None:
    changes, code = BAD_PEFT[case]
    before = sorted(path for path in store_root.rglob("*") if path.is_file())

    response = upload(client, "evil", peft_files(5) | changes)

    assert 400 <= response.status_code < 500, response.text
    assert response.json()["code"] == code, response.text
    assert sorted(path for path in store_root.rglob("*") if path.is_file()) == before
    assert client.get("/v1/adapters/evil").status_code == 404
    assert scores(client, {"task": "books", "text": "good"})


def test_a_rank_over_the_limit_is_refused(serve: Serve) -> None:
    response = upload(serve(max_rank=2), "wide", peft_files(5, rank=3))

    assert (response.status_code, response.json()["code"]) == (422, "rank_too_large")


def test_a_file_over_the_limit_is_a_413(serve: Serve) -> None:
    big = peft_files(5) | {"adapter_model.safetensors": bytes(3 * 2**20)}

    response = upload(serve(max_upload_mb=1), "big", big)

    assert response.status_code == 413


def test_an_adapter_of_another_backbone_is_refused(client: TestClient, tmp_path: Path) -> None:
    other = make_backbone(tmp_path / "other", seed=9)
    make_store(tmp_path / "elsewhere", other)
    files = exported(tmp_path / "elsewhere", "books@1", tmp_path / "out")

    response = upload(client, "foreign", files)

    assert (response.status_code, response.json()["code"]) == (422, "backbone_mismatch")


@pytest.mark.parametrize("name", ["../x", "UPPER", "", "a" * 65, "latest/..", "a@1"])
def test_names_are_identifiers_and_never_paths(client: TestClient, name: str) -> None:
    response = upload(client, name, peft_files(5), task="books")

    assert response.status_code == 422


@pytest.mark.parametrize("name", ["books@1", "Books", "b%20s", "%ff", "books@"])
def test_a_path_that_names_no_adapter_is_a_4xx(client: TestClient, name: str) -> None:
    for method, rest in [("GET", ""), ("GET", "/versions/1"), ("PUT", "/aliases/prod"), ("DELETE", "/versions/7")]:
        response = client.request(
            method, f"/v1/adapters/{name}{rest}", json={"version": 1} if method == "PUT" else None
        )
        assert response.status_code in (404, 422), (method, rest, response.text)


def test_a_damaged_manifest_is_listed_and_hides_only_itself(serve: Serve, store_root: Path) -> None:
    manifest = next((store_root / "adapters" / "films" / "versions").iterdir())
    manifest.write_text("{")

    client = serve()

    assert "corrupt" in client.get("/ready").json()["refused"]["films@1"]
    assert client.get("/v1/adapters/films").status_code == 404
    assert scores(client, {"task": "books", "text": "good"}, mode="prior")
    assert upload(client, "films", peft_files(5)).json()["reference"] == "films@2"
    unpromoted = client.post("/v1/infer", json={"inputs": [{"task": "films", "text": "good"}]})
    assert "no films@prod that can be read; films has: 2" in unpromoted.json()["detail"]
    client.put("/v1/adapters/films/aliases/prod", json={"version": 2})
    assert scores(client, {"task": "films", "text": "good"})


def test_a_damaged_blob_fails_only_its_own_requests(serve: Serve, store_root: Path) -> None:
    digest = AdapterStore(store_root).resolve("films").blob.removeprefix("sha256:")
    blob = store_root / "blobs" / "sha256" / digest
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-4] + b"oops")
    client = serve()

    failed = client.post("/v1/infer", json={"inputs": [{"task": "films", "text": "a"}], "options": {"mode": "single"}})

    assert failed.status_code == 500
    assert failed.json()["code"] == "corrupt"
    assert "films@1" in client.get("/ready").json()["refused"]
    assert scores(client, {"task": "books", "text": "good"})


def test_more_adapters_than_slots_take_turns(serve: Serve) -> None:
    roomy, tight = serve(), serve(slots=1)
    inputs = [{"task": task, "text": "good film"} for task in ("books", "films", "spam", "books")]
    body = {"inputs": inputs, "options": {"mode": "single"}}

    expected = roomy.post("/v1/infer", json=body).json()["outputs"]
    found = tight.post("/v1/infer", json=body).json()["outputs"]

    assert [one["scores"] for one in found] == [one["scores"] for one in expected]
    assert "espalier_evictions_total 0.0" not in tight.get("/metrics").text


def test_one_row_that_needs_more_adapters_than_slots_is_refused(serve: Serve) -> None:
    client = serve(slots=1)

    response = client.post(
        "/v1/infer", json={"inputs": [{"adapters": {"books": 1.0, "films": 1.0}, "head": "books", "text": "a"}]}
    )

    assert (response.status_code, response.json()["code"]) == (422, "too_many_adapters")


def test_an_unused_part_or_field_is_refused_by_name(client: TestClient) -> None:
    response = upload(client, "odd", peft_files(5) | {"adapter_model.bin": b"x"})

    assert response.status_code == 422
    assert "adapter_model.bin" in response.json()["detail"]


def test_what_another_program_publishes_is_served_after_the_next_look(
    serve: Serve, store_root: Path, backbone: Path
) -> None:
    from adapters_store.backbones import fingerprint

    client = serve(poll_s=0.05)
    AdapterStore(store_root).publish(
        make_adapter(33), name="late", task="late", kind="lora", backbone=fingerprint(backbone, "float32")
    )

    for _ in range(2000):
        if client.post("/v1/infer", json={"inputs": [{"task": "late", "text": "a"}]}).status_code == 200:
            break
    else:
        pytest.fail("the new adapter was never served")


@pytest.mark.parametrize("field", ["name", "task"])
def test_an_adapter_or_task_may_not_hide_the_backbone(client: TestClient, field: str) -> None:
    backbone = client.get("/v1/models").json()["data"][0]["id"]

    fields = {"name": "other", "task": "other"} | {field: backbone}
    response = client.post("/v1/adapters", data=fields, files=multipart(peft_files(5)))

    assert (response.status_code, response.json()["code"]) == (409, "conflict")
