"""`/v1/infer` on a backbone that generates: texts, labels and both in one call; golden examples of texts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from adapters_store import exchange
from adapters_store.adapter import Adapter
from adapters_store.backbones import fingerprint
from adapters_store.manifest import GenerationSpec, GoldenExample, HeadSpec
from adapters_store.mixing import Mix
from adapters_store.primitives.head import Head
from adapters_store.store import AdapterStore
from server.app import make_app
from server.service import Service
from tests.server.generation.tiny_decoder import HIDDEN, LAYERS, adapter, make_decoder, make_store, upload_files
from tests.server.tiny import make_backbone, multipart
from tests.server.tools import service_of, settings_for

PROMPT = "t5 t9 t31 t12"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture
def client(decoder: Path, tmp_path: Path) -> Iterator[TestClient]:
    store = AdapterStore(make_store(tmp_path / "store", decoder).resolve())
    tensors = {"weight": torch.randn(2, HIDDEN), "bias": torch.zeros(2)}
    mood = Head(HeadSpec(labels=("sad", "glad"), tensors={}, pooling="last"), tensors)
    facts = {"kind": "lora", "backbone": fingerprint(decoder, "float32")}
    store.publish(Adapter(adapter("lora", 90), mood), name="mood", task="mood", **facts)
    store.publish(
        Adapter(adapter("lora", 91)), name="short", task="short", generation=GenerationSpec(max_tokens=3), **facts
    )
    with TestClient(make_app(Service(settings_for(decoder, tmp_path / "store", kv_mb=1)))) as running:
        yield running


def infer(client: TestClient, *inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
    response = client.post("/v1/infer", json={"inputs": list(inputs), "options": options})
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_a_task_without_a_head_answers_with_text_and_others_with_labels_in_one_call(client: TestClient) -> None:
    answer = infer(
        client, {"task": "a00", "text": PROMPT}, {"task": "mood", "text": PROMPT},
        {"tasks": ["a01", "mood"], "text": "t5"}, text={"max_tokens": 7},
    )  # fmt: skip

    first, second, third, fourth = answer["outputs"]
    assert set(first) == {"task", "text", "finish_reason", "composition"}
    assert set(second) == {"task", "label", "score", "scores", "composition"}
    assert [third["task"], fourth["task"]] == ["a01", "mood"]
    assert len(first["text"].split()) == 7
    assert first["finish_reason"] == "length"
    assert len(first["composition"]["adapters"]) > 1
    assert answer["usage"] == {"input_tokens": 4 + 4 + 1 + 1, "output_tokens": 14}


def test_a_text_is_that_of_the_completions_endpoint(client: TestClient) -> None:
    for task in ("a00", "a05"):
        completed = client.post(
            "/v1/completions", json={"model": task, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        ).json()
        text = infer(client, {"task": task, "text": PROMPT}, text={"max_tokens": 12})["outputs"][0]

        assert text["text"] == completed["choices"][0]["text"]
        assert text["composition"] == completed["espalier"]["composition"]


def test_a_text_is_as_long_as_its_task_was_trained_unless_asked_otherwise(client: TestClient) -> None:
    def length(task: str, **text: Any) -> int:
        return len(infer(client, {"task": task, "text": PROMPT}, text=text)["outputs"][0]["text"].split())

    assert [length("short"), length("a00"), length("short", max_tokens=5)] == [3, 64, 5]


def test_explicit_weights_and_mixtures_without_a_head_give_texts(client: TestClient) -> None:
    inputs = [
        {"adapters": {"a00@1": 0.5, "a04": 0.5}, "text": PROMPT},
        {"mix": {"a00": 0.5, "a04": 0.5}, "text": PROMPT},
        {"adapters": {"a00@1": 1.0}, "head": "mood", "text": PROMPT},
    ]

    outputs = infer(client, *inputs)["outputs"]

    assert ["text" in output for output in outputs] == [True, True, False]
    assert [output["task"] for output in outputs] == [None, None, "mood"]


def test_modes_and_seeds(client: TestClient) -> None:
    def text(mode: str, **options: Any) -> str:
        return str(infer(client, {"task": "a00", "text": PROMPT}, mode=mode, text=options)["outputs"][0]["text"])

    assert len({text(mode) for mode in ("none", "single", "prior")}) == 3
    assert text("single", temperature=1, seed=3) == text("single", temperature=1, seed=3) != text("single")
    stopped = text("single", stop=[text("single").split()[4]])
    assert text("single").startswith(stopped)
    assert len(stopped.split()) <= 4


@pytest.mark.parametrize(
    ("one", "options", "code"),
    [
        ({"task": "a00", "text": "t5 " * 128}, {}, "context_length_exceeded"),
        ({"task": "a00", "text": "t5"}, {"text": {"max_tokens": 128}}, "context_length_exceeded"),
        ({"task": "a00", "text": ""}, {}, "invalid_input"),
        ({"task": "a00", "text": "t5", "head": "a01"}, {}, "no_head"),
        ({"task": "a00", "text": "t5"}, {"text": {"max_tokens": 0}}, "invalid_request"),
        ({"task": "a00", "text": "t5"}, {"text": {"typo": 1}}, "invalid_request"),
    ],
)
def test_what_cannot_be_written_is_refused(client: TestClient, one: dict, options: dict, code: str) -> None:
    response = client.post("/v1/infer", json={"inputs": [one], "options": options})

    assert (response.status_code, response.json()["code"]) == (422, code), response.text


def test_tasks_and_readiness_tell_what_generates(client: TestClient) -> None:
    assert client.get("/v1/tasks/a00").json()["answers"] == "text"
    assert client.get("/v1/tasks/mood").json()["answers"] == "label"
    assert client.get("/ready").json()["generation"]["max_length"] == 128


def golden(client: TestClient, seed: int) -> dict[str, Any]:
    """An example and the log-probabilities that an adapter alone gives it."""
    service = service_of(client)
    language = service.backbone.language
    assert language is not None
    ids = [*service.backbone.tokenizer("t5 t6 t7 t8")["input_ids"], 2]

    def run() -> list[float]:
        language.encoder.sites.put(1000, adapter("lora", seed))
        found = language.logprobs([ids], [Mix.one_hot(1000, LAYERS)], [2])[0].tolist()
        language.encoder.sites.drop(1000)
        return list(found)

    with torch.no_grad():
        return {"text": "t5 t6", "completion": " t7 t8", "logprobs": run()}


@pytest.mark.parametrize("change", [0.0, 0.3])
def test_an_upload_is_proved_by_the_texts_it_promises(
    client: TestClient, decoder: Path, tmp_path: Path, change: float
) -> None:
    example = golden(client, 55)
    example["logprobs"][1] += change
    other = AdapterStore(tmp_path / "other")
    facts = {"kind": "lora", "backbone": fingerprint(decoder, "float32"), "generation": GenerationSpec(max_tokens=5)}
    manifest = other.publish(
        Adapter(adapter("lora", 55)), name="new", task="new", golden=[GoldenExample.model_validate(example)], **facts
    )
    exchange.write_folder(tmp_path / "out", manifest, other.load(manifest))
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    response = client.post("/v1/adapters", data={"name": "new", "task": "new"}, files=multipart(files))

    if change:
        assert response.json()["code"] == "golden_mismatch", response.text
        assert "log-probabilities" in response.json()["detail"]
        return
    assert response.status_code == 201, response.text
    published = response.json()["manifest"]
    assert (published["generation"], len(published["golden"])) == ({"max_tokens": 5, "stop": []}, 1)
    assert len(infer(client, {"task": "new", "text": "t5"})["outputs"][0]["text"].split()) == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"completion": " t7" * 128}, "131 tokens with its completion, the backbone's context has 128"),
        ({"text": "", "completion": ""}, "no token to compare"),
    ],
)
def test_a_completion_that_cannot_be_run_is_refused_at_upload_and_at_load(
    client: TestClient, decoder: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    examples = [GoldenExample.model_validate(golden(client, 55) | change)]
    facts = {"kind": "lora", "backbone": fingerprint(decoder, "float32"), "golden": examples}
    manifest = service_of(client).store.publish(Adapter(adapter("lora", 55)), name="long", task="long", **facts)
    exchange.write_folder(tmp_path / "out", manifest, service_of(client).store.load(manifest))
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    uploaded = client.post("/v1/adapters", data={"name": "new", "task": "new"}, files=multipart(files))
    client.put("/v1/adapters/a00/aliases/prod", json={"version": 1})  # the server looks at the store again
    loaded = client.post("/v1/adapters/long/load")

    for response in (uploaded, loaded):
        assert (response.status_code, response.json()["code"]) == (422, "golden_mismatch"), response.text
        assert said in response.json()["detail"]


@torch.no_grad()
def test_log_probabilities_a_few_tokens_at_a_time_are_those_of_all_at_once(client: TestClient) -> None:
    language = service_of(client).backbone.language
    assert language is not None
    ids = [1, *range(3, 30)]

    [whole] = language.logprobs([ids], [None], [5])
    [found] = language.logprobs([ids], [None], [5], max_logits=3 * language.vocab_size)

    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "line",
    [{"text": "a", "completion": "b"}, {"text": "a", "logprobs": [0.0]}, {"text": "a", "logits": []}, {"text": "a"}],
)
def test_an_example_says_logits_or_log_probabilities(
    client: TestClient, decoder: Path, tmp_path: Path, line: dict[str, Any]
) -> None:
    files = upload_files(tmp_path / "other", decoder, "a00", 5) | {"examples.jsonl": json.dumps(line).encode()}

    response = client.post("/v1/adapters", data={"name": "new", "task": "new"}, files=multipart(files))

    assert response.status_code == 422
    assert "examples.jsonl" in response.json()["detail"]


def test_an_encoder_refuses_to_generate_and_a_decoder_may_be_told_not_to(decoder: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "store", decoder)
    settings = settings_for(decoder, tmp_path / "store", generate=False)
    with TestClient(make_app(Service(settings))) as embedding:
        assert service_of(embedding).generator is None
        assert embedding.post("/v1/embeddings", json={"model": "a00", "input": "t5"}).status_code == 200
        assert embedding.post("/v1/completions", json={"model": "a00", "prompt": "t5"}).status_code in (400, 404)
    with pytest.raises(Exception, match="cannot generate"):
        Service(settings_for(make_backbone(tmp_path / "bert"), tmp_path / "store", generate=True))
