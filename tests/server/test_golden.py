"""Golden examples: no adapter answers before it has given the logits that its training promised."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from starlette.testclient import TestClient

from adapters_store import exchange
from adapters_store.adapter import Adapter
from adapters_store.backbones import fingerprint
from adapters_store.errors import CorruptError
from adapters_store.manifest import GoldenExample, Manifest
from adapters_store.mixing import Mix
from adapters_store.primitives.head import Head
from adapters_store.store import AdapterStore
from server import golden
from server.app import make_app
from server.engine import Row
from server.service import Service
from tests.server.conftest import Serve
from tests.server.tiny import head, lora, make_adapter, multipart, peft_files
from tests.server.tools import metric, publish, running, service_of, settings_for

TEXTS = ("good book", "an awful, cheap film", "word1 word2 word3")
WRONG = (GoldenExample(text="good", logits=(40.0, -40.0)),)


def true_examples(backbone: Path, store_root: Path, adapter: Adapter) -> tuple[GoldenExample, ...]:
    """What the adapter gives alone, in float32."""

    async def scenario() -> list[list[float]]:
        async with running(settings_for(backbone, store_root, preload=False)) as service:
            mix, own = Mix.one_hot(0, 2), adapter.head
            rows = [Row(ids, mix, "mean", own) for ids in service.backbone.tokenize(TEXTS, [None] * len(TEXTS))]
            await service.engine.run(lambda: service.backbone.encoder.sites.put(0, adapter.entries))
            return (await service.engine.run(lambda: service.engine.forward(rows))).outputs

    return tuple(
        GoldenExample(text=text, logits=tuple(logits))
        for text, logits in zip(TEXTS, asyncio.run(scenario()), strict=True)
    )


def ask(client: TestClient, task: str) -> Any:
    return client.post("/v1/infer", json={"inputs": [{"task": task, "text": "good"}], "options": {"mode": "single"}})


def assert_refused(client: TestClient, task: str) -> None:
    response = ask(client, task)
    assert (response.status_code, response.json()["code"]) == (422, "golden_mismatch"), response.text
    assert f"{task}@1" in client.get("/ready").json()["refused"]


def test_what_fails_its_examples_at_the_start_is_listed_and_never_answers(
    serve: Serve, store_root: Path, backbone: Path
) -> None:
    publish(store_root, backbone, "liar", 21, golden=WRONG)

    client = serve()

    assert client.get("/ready").status_code == 200
    assert_refused(client, "liar")
    assert ask(client, "books").status_code == 200


def test_what_is_published_later_is_proved_before_its_first_answer_and_only_then(
    serve: Serve, store_root: Path, backbone: Path
) -> None:
    client = serve(poll_s=0.01, slots=1)
    adapter = make_adapter(22)
    publish(store_root, backbone, "liar", 21, golden=WRONG)
    publish(store_root, backbone, "honest", 22, golden=true_examples(backbone, store_root, adapter))
    while client.get("/v1/adapters/honest").status_code != 200:
        pass

    answers = [ask(client, task).json()["outputs"][0] for task in ("honest", "books", "honest")]

    assert answers[0] == answers[2]
    assert_refused(client, "liar")
    loads = metric(client, "espalier_load_failures_total", code="golden_mismatch")
    assert_refused(client, "liar")
    assert metric(client, "espalier_load_failures_total", code="golden_mismatch") == loads == 1  # it is remembered


def test_a_version_is_proved_once_and_not_at_every_reload(backbone: Path, store_root: Path) -> None:
    publish(store_root, backbone, "honest", 22, golden=true_examples(backbone, store_root, make_adapter(22)))
    proofs: list[str] = []

    class Watched(Service):
        async def _prove(self, manifest: Manifest, *rest: Any) -> None:
            proofs.append(manifest.name)
            await super()._prove(manifest, *rest)

    async def scenario() -> None:
        service = Watched(settings_for(backbone, store_root, preload=False))
        await service.start()
        honest = service.catalog.resolve("honest")
        for _ in range(3):
            service.residency.release(await service.residency.lease([honest]))
            await service.residency.unload([honest], 1)
        await service.stop()

    asyncio.run(scenario())

    assert proofs == ["honest"]


def test_a_mixture_with_a_refused_adapter_is_refused_too(serve: Serve, store_root: Path, backbone: Path) -> None:
    publish(store_root, backbone, "liar", 21, golden=WRONG)
    client = serve()

    response = client.post(
        "/v1/infer", json={"inputs": [{"adapters": {"liar": 0.5, "books": 0.5}, "head": "books", "text": "a"}]}
    )

    assert (response.status_code, response.json()["code"]) == (422, "golden_mismatch")
    assert service_of(client).residency.num_held == 0


def test_unloading_a_refused_version_lets_it_be_tried_again(serve: Serve, store_root: Path, backbone: Path) -> None:
    publish(store_root, backbone, "liar", 21, golden=WRONG)
    client = serve()

    client.post("/v1/adapters/liar/unload")

    assert client.get("/ready").json()["refused"] == {}
    assert_refused(client, "liar")


def upload(client: TestClient, files: dict[str, bytes], **fields: str) -> Any:
    return client.post("/v1/adapters", data={"name": "new", "task": "new"} | fields, files=multipart(files))


def exported(manifest: Manifest, store_root: Path, folder: Path) -> dict[str, bytes]:
    exchange.write_folder(folder, manifest, AdapterStore(store_root).load(manifest))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def lines(examples: Sequence[GoldenExample]) -> bytes:
    return "\n".join(json.dumps({"text": one.text, "logits": one.logits}) for one in examples).encode()


def test_an_upload_with_true_examples_is_taken_and_keeps_them(
    client: TestClient, store_root: Path, backbone: Path
) -> None:
    # PEFT writes A and B as they are, with scale alpha / r = 2
    adapter = Adapter(lora(7, 3, scale=2.0), head(7, ("no", "yes")))
    examples = true_examples(backbone, store_root, adapter)

    response = upload(client, peft_files(7) | {"examples.jsonl": lines(examples)})

    assert response.status_code == 201, response.text
    assert len(response.json()["manifest"]["golden"]) == len(TEXTS)
    assert ask(client, "new").status_code == 200


@pytest.mark.parametrize(
    "examples",
    [
        b'{"text": "good", "logits": [1.0]}',
        b'{"text": "good", "logits": [NaN, 0]}',
        b'{"text": "good"}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"text": "a", "logits": [0, 0]}\n' * 65,
    ],
    ids=["too_few", "nan", "incomplete", "deep", "not_utf8", "too_many"],
)
def test_examples_that_are_none_are_refused(client: TestClient, examples: bytes) -> None:
    response = upload(client, peft_files(7) | {"examples.jsonl": examples})

    assert response.status_code == 422, response.text
    assert response.json()["code"] in ("golden_mismatch", "bad_format")
    assert client.get("/v1/adapters/new").status_code == 404


def test_the_same_tensors_with_right_examples_do_not_inherit_a_refusal_nor_cure_it(
    serve: Serve, store_root: Path, backbone: Path, tmp_path: Path
) -> None:
    right = true_examples(backbone, store_root, make_adapter(22))
    refused = publish(store_root, backbone, "new", 22, golden=WRONG)
    files = exported(refused, store_root, tmp_path / "out")
    client = serve()
    assert_refused(client, "new")

    response = upload(client, files | {"examples.jsonl": lines(right)}, alias="prod")

    assert (response.status_code, response.json()["digest"]) == (201, refused.digest), response.text
    for server in (client, serve()):  # also where the good version came first
        assert ask(server, "new").status_code == 200
        old = server.post("/v1/infer", json={"inputs": [{"adapters": {"new@1": 1.0}, "head": "new@1", "text": "a"}]})
        assert (old.status_code, old.json()["code"]) == (422, "golden_mismatch"), old.text
        assert list(server.get("/ready").json()["refused"]) == ["new@1"]


def test_a_load_that_fails_after_publishing_says_that_the_version_is_there(backbone: Path, store_root: Path) -> None:
    class Failing(Service):
        def load(self, manifest: Manifest) -> Adapter:
            raise CorruptError(f"{manifest.reference} cannot be loaded: the disk says no")

    service = Failing(settings_for(backbone, store_root, preload=False))
    with TestClient(make_app(service)) as client:
        response = upload(client, peft_files(7), alias="prod")

        assert (response.status_code, response.json()["code"]) == (500, "not_served"), response.text
        assert "new@1 is published, and 'prod' points at it" in response.json()["detail"]
        assert "the disk says no" in response.json()["detail"]
        assert client.get("/v1/adapters/new").json()["aliases"] == {"prod": 1}


def test_the_limit_of_examples_holds_for_a_manifests_own_too_and_at_load(
    serve: Serve, store_root: Path, backbone: Path, tmp_path: Path
) -> None:
    many = true_examples(backbone, store_root, make_adapter(22)) * 22
    manifest = publish(store_root, backbone, "eager", 22, golden=many)
    files = exported(manifest, store_root, tmp_path / "out")
    client = serve()

    response = upload(client, files)

    assert (response.status_code, response.json()["code"]) == (422, "golden_mismatch"), response.text
    assert "66 golden examples, at most 64" in response.json()["detail"]
    assert_refused(client, "eager")


def test_examples_run_in_chunks_no_longer_than_a_batch(serve: Serve, store_root: Path, backbone: Path) -> None:
    examples = true_examples(backbone, store_root, Adapter(lora(7, 3, scale=2.0), head(7, ("no", "yes")))) * 5
    client = serve(batch_tokens=16)
    lengths: list[int] = []

    def note(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        lengths.append(kwargs["input_ids"].numel())

    service_of(client).backbone.encoder.model.register_forward_pre_hook(note, with_kwargs=True)
    response = upload(client, peft_files(7) | {"examples.jsonl": lines(examples)})

    assert response.status_code == 201, response.text
    assert len(lengths) > 1
    assert max(lengths) <= 16


def test_logits_without_a_head_are_refused_at_upload_and_passed_over_where_they_are_stored(
    serve: Serve, store_root: Path, backbone: Path
) -> None:
    headless = {name: data for name, data in peft_files(7).items() if not name.startswith("head")}
    facts = {"kind": "lora", "backbone": fingerprint(backbone, "float32"), "golden": WRONG}
    AdapterStore(store_root).publish(Adapter(lora(21)), name="skill", task="skill", **facts)
    client = serve()

    response = upload(client, headless | {"examples.jsonl": lines(WRONG)})
    mixed = {"inputs": [{"adapters": {"skill": 0.5, "books": 0.5}, "head": "books", "text": "a"}]}

    assert (response.status_code, response.json()["code"]) == (422, "golden_mismatch"), response.text
    assert "no head" in response.json()["detail"]
    assert client.get("/v1/adapters/new").status_code == 404
    assert client.post("/v1/infer", json=mixed).status_code == 200
    assert client.get("/ready").json()["refused"] == {}
    assert upload(client, headless).status_code == 201


def test_an_adapter_whose_answers_overflow_is_refused_at_upload(client: TestClient) -> None:
    files = peft_files(7)
    huge = {
        f"base_model.model.{entry.site}.lora_{name}.weight": tensor * 1e30
        for entry in lora(7, 3, modules=("query", "value"))
        for name, tensor in entry.tensors.items()
    }

    response = upload(client, files | {"adapter_model.safetensors": save(huge)})

    assert (response.status_code, response.json()["code"]) == (422, "golden_mismatch")
    assert "NaN or infinity" in response.json()["detail"]
    assert ask(client, "books").status_code == 200


def test_an_overflowing_adapter_that_came_unproved_gives_a_problem_and_its_neighbours_answers(
    serve: Serve, store_root: Path, backbone: Path
) -> None:
    entries = list(lora(8))
    for entry in entries:
        entry.tensors["B"].mul_(1e38)
    AdapterStore(store_root).publish(
        Adapter(entries, head(8)), name="huge", task="huge", kind="lora", backbone=fingerprint(backbone, "float32")
    )
    client = serve()

    response = ask(client, "huge")

    assert (response.status_code, response.json()["code"]) == (422, "not_finite_answer"), response.text
    assert ask(client, "books").status_code == 200


def test_a_bfloat16_server_takes_float32_examples(serve: Serve, store_root: Path, backbone: Path) -> None:
    publish(store_root, backbone, "honest", 22, golden=true_examples(backbone, store_root, make_adapter(22)))
    publish(store_root, backbone, "liar", 21, golden=WRONG)

    client = serve(dtype="bfloat16")

    assert list(client.get("/ready").json()["refused"]) == ["liar@1"]
    assert ask(client, "honest").status_code == 200


def test_a_head_that_wants_a_pooler_of_a_backbone_without_one_is_refused(serve: Serve) -> None:
    client = serve()
    service = service_of(client)
    service.backbone.encoder.pooler = None
    files = peft_files(7) | {"head.json": json.dumps({"labels": ["no", "yes"], "pooling": "pooler"}).encode()}

    response = upload(client, files)

    assert (response.status_code, response.json()["code"]) == (422, "unsupported"), response.text


def test_a_head_that_leaves_no_room_for_text_is_refused_at_upload_and_at_load(
    serve: Serve, store_root: Path, backbone: Path
) -> None:
    own = head(9)
    short = Adapter(lora(9), Head(own.spec.model_copy(update={"max_length": 1}), own.tensors))
    mine = fingerprint(backbone, "float32")
    AdapterStore(store_root).publish(short, name="short", task="short", kind="lora", backbone=mine)
    client = serve()

    responses = [ask(client, "short")]
    for max_length in (1, 2, 3):
        facts = {"labels": ["no", "yes"], "max_length": max_length}
        responses.append(upload(client, peft_files(7) | {"head.json": json.dumps(facts).encode()}))

    assert [one.status_code for one in responses] == [422, 422, 422, 201]
    for refused in responses[:3]:
        assert refused.json()["code"] == "unsupported"
        assert "give at least 3" in refused.json()["detail"]
    assert ask(client, "books").status_code == 200


def test_no_row_is_longer_than_its_limit_whatever_that_is(client: TestClient) -> None:
    served = service_of(client).backbone
    limits = [1, 2, 3, None]

    for tokenize in (served.tokenize, served.tokenize_many):
        assert [len(row) for row in tokenize(["good " * 3000] * 4, limits)] == [1, 2, 3, 64]


def test_the_probe_leaves_nothing_on_the_device(backbone: Path, store_root: Path) -> None:
    from adapters_store.sites import num_filled

    async def scenario() -> int:
        async with running(settings_for(backbone, store_root, preload=False)) as service:
            await golden.prove(service, make_adapter(3), (), "x")
            with pytest.raises(golden.GoldenError):
                await golden.prove(service, make_adapter(3), WRONG, "x")
            return await service.engine.run(lambda: num_filled(service.backbone.encoder.sites))

    assert asyncio.run(scenario()) == 0
    assert torch.get_num_threads() == 1
