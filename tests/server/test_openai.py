"""OpenAI's endpoints, as raw HTTP and through OpenAI's own SDK."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from starlette.testclient import TestClient

from server.service import Service
from tests.server.tools import held_engine, live, raw_post, service_of, settings_for, until


def embed(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/embeddings", json={"model": "books", "input": "good book"} | body)


def vectors(client: TestClient, **body: Any) -> np.ndarray:
    response = embed(client, **body)
    assert response.status_code == 200, response.text
    return np.array([one["embedding"] for one in response.json()["data"]])


def test_models_are_the_backbone_the_tasks_and_the_adapters(client: TestClient) -> None:
    listed = client.get("/v1/models").json()

    assert listed["object"] == "list"
    assert [(one["id"], one["kind"]) for one in listed["data"][1:]] == [(t, "task") for t in ("books", "films", "spam")]
    assert listed["data"][0]["kind"] == "backbone"
    assert all(one["created"] > 0 and one["parent"] == listed["data"][0]["id"] for one in listed["data"][1:])


@pytest.mark.parametrize("name", ["books", "books@1", "books@prod", "books@latest", "books%40prod"])
def test_a_model_may_be_a_reference(client: TestClient, name: str) -> None:
    response = client.get(f"/v1/models/{name}")

    assert response.status_code == 200, response.text
    assert response.json()["id"] == name.replace("%40", "@")


@pytest.mark.parametrize("name", ["nobody", "books@9", "books@nowhere", "org/model", "gpt-4o", "UPPER", "a b", "@"])
def test_an_unknown_model_is_404_in_openais_error_object(client: TestClient, name: str) -> None:
    for response in (client.get(f"/v1/models/{name}"), embed(client, model=name)):
        error = response.json()["error"]
        assert response.status_code == 404, response.text
        assert (error["type"], error["code"]) == ("not_found_error", "model_not_found")
        assert set(error) == {"message", "type", "param", "code"}


def test_base64_and_floats_are_the_same_numbers(client: TestClient) -> None:
    floats = vectors(client)[0]
    coded = embed(client, encoding_format="base64").json()["data"][0]["embedding"]

    assert np.array_equal(np.frombuffer(base64.b64decode(coded), "<f4"), floats.astype(np.float32))
    assert np.linalg.norm(floats) == pytest.approx(1, abs=1e-6)


def test_a_list_embeds_as_its_texts_alone_and_counts_their_tokens(client: TestClient) -> None:
    texts = ["good book", "bad", "an awful film " * 9]

    reply = embed(client, input=texts).json()
    alone = [vectors(client, input=text)[0] for text in texts]

    assert [one["index"] for one in reply["data"]] == [0, 1, 2]
    assert np.allclose([one["embedding"] for one in reply["data"]], alone, atol=1e-5)
    assert reply["usage"]["prompt_tokens"] == reply["usage"]["total_tokens"] == 4 + 3 + 29


def test_token_ids_embed_as_their_text(client: TestClient) -> None:
    texts = ["good book", "bad"]
    ids = service_of(client).backbone.tokenize(texts, [None, None])

    assert np.allclose(vectors(client, input=ids), vectors(client, input=texts), atol=1e-6)
    assert np.allclose(vectors(client, input=ids[0]), vectors(client, input=texts[0]), atol=1e-6)


def test_token_ids_are_those_that_the_model_reads_not_those_that_its_tokenizer_knows(client: TestClient) -> None:
    backbone = service_of(client).backbone
    backbone.tokenizer.add_tokens([f"beyond{i}" for i in range(10)])

    assert len(backbone.tokenizer) > backbone.num_embeddings == 94
    assert embed(client, input=[93]).status_code == 200
    refused = embed(client, input=[94])
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_input")
    assert "between 0 and 93" in refused.json()["error"]["message"]


def test_models_embed_differently_and_extras_say_how(client: TestClient) -> None:
    bare = vectors(client, model=client.get("/v1/models").json()["data"][0]["id"])
    alone = vectors(client, model="books@1")
    single = vectors(client, espalier={"mode": "single"})
    composed = embed(client, espalier={"explain": True}).json()

    assert np.array_equal(alone, single)
    assert not np.allclose(bare, alone, atol=1e-3)
    assert not np.allclose(alone, composed["data"][0]["embedding"], atol=1e-3)
    assert composed["espalier"]["composition"]["adapters"][0]["weights_by_layer"]
    assert np.array_equal(vectors(client, espalier={"adapters": {"books": 1.0}}), alone)
    assert np.allclose(vectors(client, espalier={"mix": {"books": 2.0}}), composed["data"][0]["embedding"], atol=1e-6)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"dimensions": 8}, "32 dimensions"),
        ({"input": []}, "empty"),
        ({"input": [[]]}, "token ids"),
        ({"input": [10_000]}, "token ids"),
        ({"input": [-1]}, "token ids"),
        ({"input": [5] * 65}, "token ids"),
        ({"input": 5}, "input"),
        ({"input": ["a", 5]}, "input"),
        ({"input": None}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"typo": 1}, "typo"),
        ({"espalier": {"typo": 1}}, "typo"),
        ({"espalier": {"adapters": {"books": [1.0]}}}, "layers"),
        ({"espalier": {"temperature": 0}}, "temperature"),
        ({"input": ["a"] * 1025}, "1024"),
    ],
)
def test_what_cannot_be_embedded_is_a_400_that_says_why(client: TestClient, body: dict, said: str) -> None:
    response = embed(client, **body)

    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_dimensions_that_are_the_backbones_own_are_fine(client: TestClient) -> None:
    assert vectors(client, dimensions=32).shape == (1, 32)


def test_what_needs_generation_is_404_in_openais_form(client: TestClient) -> None:
    response = client.post("/v1/chat/completions", json={})

    assert response.status_code == 404
    assert "error" in response.json()


@pytest.fixture(scope="module")
def real(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service]]:
    from tests.server.tiny import make_store

    make_store(tmp_path_factory.mktemp("openai") / "store", backbone)
    store = tmp_path_factory.getbasetemp() / "openai0" / "store"
    with live(settings_for(backbone, store, queue_tokens=16)) as server:
        yield server


def sdk(real: tuple[str, Service], **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{real[0]}/v1", api_key="none", **options)


def test_the_sdk_lists_and_retrieves_models(real: tuple[str, Service]) -> None:
    with sdk(real) as client:
        listed = [model.id for model in client.models.list()]
        one = client.models.retrieve("books@prod")

    assert listed[1:] == ["books", "films", "spam"]
    assert (one.id, one.owned_by) == ("books@prod", "espalier")


def test_the_sdk_embeds_in_its_default_base64_and_in_floats(real: tuple[str, Service]) -> None:
    with sdk(real) as client:
        default = client.embeddings.create(model="books", input=["good", "bad"])
        floats = client.embeddings.create(model="books", input=["good", "bad"], encoding_format="float")
        extra = client.embeddings.create(model="books", input="good", extra_body={"espalier": {"mode": "none"}})

    assert np.allclose([one.embedding for one in default.data], [one.embedding for one in floats.data], atol=1e-6)
    assert default.usage.prompt_tokens == 6
    assert extra.model_dump()["espalier"]["composition"]["mode"] == "none"


def test_the_sdk_maps_errors_with_their_code_and_request_id(real: tuple[str, Service]) -> None:
    with sdk(real) as client, pytest.raises(openai.NotFoundError) as unknown:
        client.embeddings.create(model="nobody", input="a")
    with sdk(real) as client, pytest.raises(openai.BadRequestError) as bad:
        client.embeddings.create(model="books", input="a", dimensions=8)

    assert unknown.value.code == "model_not_found"
    assert len(str(unknown.value.request_id)) == 32
    assert bad.value.code == "invalid_input"
    assert "32 dimensions" in bad.value.message


def test_the_sdk_waits_for_retry_after_and_then_is_answered(real: tuple[str, Service]) -> None:
    url, service = real
    blockers = []
    with sdk(real, max_retries=0) as impatient, sdk(real, max_retries=3) as patient:
        with held_engine(service):
            for held in (1, 2):
                blockers.append(raw_post(url, "/v1/embeddings", {"model": "books", "input": "good " * 10}))
                until(lambda held=held: service.residency.num_held == 2 * held)
            with pytest.raises(openai.RateLimitError) as refused:
                impatient.embeddings.create(model="books", input="good " * 10)
        for blocker in blockers:
            blocker.close()
        answered = patient.embeddings.create(model="books", input="good " * 10)

    assert refused.value.code == "overloaded"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert len(answered.data) == 1


def test_the_sdk_retries_a_429_by_itself(real: tuple[str, Service]) -> None:
    import threading

    url, service = real
    rejected = service.metrics.rejected
    before = rejected._value.get()
    answers: list[Any] = []

    def create() -> None:
        with sdk(real, max_retries=3) as client:
            answers.append(client.embeddings.create(model="books", input="good " * 10))

    with held_engine(service):
        blockers = []
        for held in (1, 2):
            blockers.append(raw_post(url, "/v1/embeddings", {"model": "books", "input": "good " * 10}))
            until(lambda held=held: service.residency.num_held == 2 * held)
        thread = threading.Thread(target=create)
        thread.start()
        until(lambda: rejected._value.get() > before)
    thread.join()
    for blocker in blockers:
        blocker.close()

    assert len(answers[0].data) == 1
