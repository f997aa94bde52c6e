"""What `model`, `espalier` and `lora` mean: the composition that answers is the one that was asked for."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from adapters_store.store import AdapterStore
from server import openai_schema
from server.openai_models import lora_id
from tests.server.generation.stories import (
    BEGUN,
    LAYERS,
    NAME,
    NEEDS_STORIES,
    TASKS,
    Stories,
    publish_story,
    stories_server,
)
from tests.server.test_openapi import assert_said
from tests.server.tools import until

pytestmark = NEEDS_STORIES


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stories]:
    folder = tmp_path_factory.mktemp("names")
    with stories_server(folder, poll_s=0.05) as server:
        publish_story(folder / "store", "tales", 9)  # a second version; prod stays with the first
        server.http.post("/v1/adapters/tales/load")
        yield server


def composition(stories: Stories, **body: Any) -> tuple[str, dict[str, float]]:
    """Mode and weights by reference, as an answer tells them."""
    told = stories.complete(max_tokens=1, **body)["espalier"]["composition"]
    return told["mode"], {f"{one['name']}@{one['version']}": one["weight"] for one in told["adapters"]}


def digest_of(stories: Stories, reference: str) -> str:
    return AdapterStore(stories.service.settings.store).resolve(reference).digest


def test_the_backbone_answers_bare(stories: Stories) -> None:
    assert composition(stories) == ("none", {})
    assert composition(stories, espalier={"mode": "none"}) == ("none", {})


def test_a_task_answers_under_its_composition(stories: Stories) -> None:
    mode, weights = composition(stories, model="tales")
    with_head = composition(stories, model="moods")

    assert mode == "prior"
    assert set(weights) == {"tales@1", "verse@1"}
    assert sum(weights.values()) == pytest.approx(1, abs=1e-5)
    assert with_head[0] == "prior"  # the head is there to classify; here nobody asks it
    assert composition(stories, model="tales", espalier={"mode": "single"}) == ("single", {"tales@1": 1.0})
    assert composition(stories, model="tales", espalier={"mode": "none"}) == ("none", {})
    assert set(composition(stories, model="tales", espalier={"top_k": 1})[1]) == {"tales@1"}
    assert set(composition(stories, model="tales", espalier={"threshold": 0.99})[1]) == {"tales@1"}


@pytest.mark.parametrize("selector", ["@1", "@prod", "@2", "@latest", ""])
def test_a_reference_answers_alone(stories: Stories, selector: str) -> None:
    version = {"@1": 1, "@prod": 1, "@2": 2, "@latest": 2, "": 2}[selector]
    expected = ("explicit", {f"tales@{version}": 1.0})

    if selector:
        assert composition(stories, model=f"tales{selector}") == expected
    assert composition(stories, model=f"{NAME}:tales{selector}") == expected


def test_a_colon_before_the_adapter_is_sglangs_and_one_behind_it_a_digests(stories: Stories) -> None:
    digest = digest_of(stories, "tales@1")
    assert digest.startswith("sha256:")

    for model in (f"tales@{digest}", f"{NAME}:tales@{digest}", f"{NAME}:tales@{digest[:19]}"):
        assert composition(stories, model=model) == ("explicit", {"tales@1": 1.0}), model
        assert stories.http.get(f"/v1/models/{model}").json()["id"] == model


@pytest.mark.parametrize(
    "model", ["nobody", "other:tales", f"{NAME}:", f"{NAME}:nobody", f"{NAME}:tales@9", "tales:x", ":"]
)
def test_an_unknown_name_is_no_model(stories: Stories, model: str) -> None:
    for path, more in (("/v1/completions", {"prompt": BEGUN}), ("/v1/embeddings", {"input": BEGUN})):
        response = stories.post(path, {"model": model} | more)

        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found"), path


def test_llama_cpps_list_gives_weights_by_name_or_number(stories: Stories) -> None:
    numbers = {one["path"]: one["id"] for one in stories.http.get("/lora-adapters").json()}
    by_number = [{"id": numbers["tales"], "scale": 0.5}, {"id": numbers["verse"], "scale": -0.25}]
    by_name = [{"id": "tales", "scale": 0.5}, {"id": "verse", "scale": -0.25}]

    assert composition(stories, lora=by_name) == ("explicit", {"tales@2": 0.5, "verse@1": -0.25})
    assert composition(stories, lora=by_number) == composition(stories, lora=by_name)
    assert composition(stories, lora=[{"id": "tales@1", "scale": 1}]) == ("explicit", {"tales@1": 1.0})
    assert composition(stories, model="verse", lora=by_name) == composition(stories, lora=by_name)
    assert composition(stories, lora=[]) == ("none", {})
    assert composition(stories, lora=[{"id": "tales", "scale": 0}])[1] == {}


def test_the_numbers_stay_whatever_comes_and_goes(stories: Stories) -> None:
    def listed() -> dict[str, int]:
        answer = stories.http.get("/lora-adapters").json()
        assert_said(answer, openai_schema.LoraAdapters)
        assert all(one["scale"] == 0 for one in answer)
        return {one["path"]: one["id"] for one in answer}

    before = listed()
    root = stories.service.settings.store
    for name in ("a-first", "zz-last"):
        publish_story(root, name, 20)
    stories.http.post("/v1/load_lora_adapter", json={"lora_name": "tales"})
    until(lambda: len(listed()) == len(before) + 2)
    after = listed()
    stories.http.delete("/v1/adapters/a-first/versions/1")

    assert set(before) == set(TASKS)
    assert {name: after[name] for name in before} == before
    assert listed() == {name: number for name, number in after.items() if name != "a-first"}
    assert len(set(after.values())) == len(after)
    assert all(0 <= number < 2**31 for number in after.values())
    gone = stories.post(
        "/v1/completions", {"model": NAME, "prompt": BEGUN, "lora": [{"id": after["a-first"], "scale": 1}]}
    )
    assert (gone.status_code, "GET /lora-adapters" in gone.json()["error"]["message"]) == (400, True)
    stories.http.delete("/v1/adapters/zz-last/versions/1")


def test_two_names_of_one_number_are_refused_not_guessed(stories: Stories) -> None:
    first, second = _same_number()
    root = stories.service.settings.store
    for name in (first, second):
        publish_story(root, name, 21)
    until(lambda: {first, second} <= set(stories.service.catalog.manifests))
    body = {"model": NAME, "prompt": BEGUN, "lora": [{"id": lora_id(first), "scale": 1}]}

    response = stories.post("/v1/completions", body)

    assert response.status_code == 400
    assert first in response.json()["error"]["message"]
    assert second in response.json()["error"]["message"]
    for name in (first, second):
        stories.http.delete(f"/v1/adapters/{name}/versions/1")


def _same_number() -> tuple[str, str]:
    """Two names whose numbers are equal; some 50,000 tries find a pair."""
    seen: dict[int, str] = {}
    for number in range(1_000_000):
        name = f"n{number}"
        other = seen.setdefault(lora_id(name), name)
        if other != name:
            return other, name
    raise AssertionError("no pair found")


def test_espaliers_own_field_says_more_than_the_model(stories: Stories) -> None:
    layers = [1.0, 0.5, 0.0, 0.5, 1.0]
    explicit = stories.complete(model=NAME, max_tokens=1, espalier={"adapters": {"tales@1": layers}, "explain": True})
    mixed = composition(stories, model=NAME, espalier={"mix": {"tales": 1, "verse": 1}})
    single = composition(stories, model="moods", espalier={"mix": {"tales": 3, "verse": 1}, "mode": "single"})

    told = explicit["espalier"]["composition"]["adapters"][0]
    assert (told["weights_by_layer"], len(layers)) == (layers, LAYERS)
    assert mixed[0] == "prior"
    assert single == ("single", {"tales@1": pytest.approx(0.75), "verse@1": pytest.approx(0.25)})


def test_equal_compositions_tell_equal_texts_and_others_do_not(stories: Stories) -> None:
    def told(**body: Any) -> str:
        return stories.text(max_tokens=32, **body)

    alone = told(model="tales@1")

    assert alone == told(model=f"{NAME}:tales@prod") == told(lora=[{"id": "tales@1", "scale": 1}])
    assert alone == told(model="tales", espalier={"mode": "single"}) == told(espalier={"adapters": {"tales@1": 1}})
    assert told() == told(lora=[]) == told(model="tales", espalier={"mode": "none"})
    assert len({told(), alone, told(model="tales@2"), told(model="verse@1"), told(model="tales")}) == 5
    assert told(lora=[{"id": "tales@1", "scale": 0.0}]) == told()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"lora": [{"id": "tales", "scale": 1}], "espalier": {"adapters": {"verse": 1}}}, "adapters and lora each say"),
        ({"espalier": {"adapters": {"verse": 1}, "mix": {"tales": 1}}}, "adapters and mix each say"),
        ({"lora": [{"id": "tales", "scale": 1}, {"id": "tales", "scale": 2}]}, "names an adapter twice"),
        ({"lora": [{"id": -1, "scale": 1}]}, "id -1 is none"),
        ({"lora": [{"id": True, "scale": 1}]}, "lora.0.id"),
        ({"lora": [{"id": "tales"}]}, "lora.0.scale"),
        ({"lora": [{"id": "tales", "scale": 1e9}]}, "at most 1e4"),
        ({"lora": [{"id": "tales", "scale": 1}], "espalier": {"mode": "prior"}}, "mode 'prior' goes with a task"),
        ({"espalier": {"mode": "prior"}}, "mode 'prior' goes with a task"),
        ({"model": "tales@1", "espalier": {"mode": "single"}}, "mode 'single' goes with a task"),
        ({"model": "tales", "espalier": {"mode": "explicit"}}, "needs 'adapters'"),
        ({"espalier": {"temperature": 0}}, "espalier.temperature"),
    ],
)
def test_what_cannot_be_meant_is_refused(stories: Stories, body: dict[str, Any], said: str) -> None:
    response = stories.post("/v1/completions", {"model": NAME, "prompt": BEGUN} | body)

    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]


def test_unknown_adapters_are_404(stories: Stories) -> None:
    for more in ({"lora": [{"id": "nobody", "scale": 1}]}, {"espalier": {"adapters": {"tales@7": 1}}}):
        response = stories.post("/v1/completions", {"model": NAME, "prompt": BEGUN} | more)

        assert (response.status_code, response.json()["error"]["code"]) == (404, "adapter_not_found")


def test_embeddings_mean_the_same_by_the_same_names(stories: Stories) -> None:
    def vector(model: str) -> np.ndarray:
        response = stories.post("/v1/embeddings", {"model": model, "input": BEGUN})
        assert response.status_code == 200, response.text
        return np.array(response.json()["data"][0]["embedding"])

    assert np.array_equal(vector("tales@1"), vector(f"{NAME}:tales@prod"))
    assert not np.allclose(vector("tales@1"), vector(NAME), atol=1e-3)
    assert not np.allclose(vector("tales@1"), vector("tales@2"), atol=1e-3)


def test_vllms_names_are_kept_to_what_they_mean(stories: Stories) -> None:
    load = "/v1/load_lora_adapter"

    assert stories.post(load, {"lora_name": "verse", "lora_path": "verse@1"}).json()["state"] == "device"
    assert stories.post(load, {"lora_name": "tales@1"}).json()["version"] == 1
    other = stories.post(load, {"lora_name": "tales", "lora_path": "tales@1"})
    assert (other.status_code, "tales@2" in other.json()["detail"]) == (422, True)
    assert stories.post(load, {"lora_name": "mine", "lora_path": "tales"}).status_code == 404
    assert stories.post(load, {"lora_name": "tales", "lora_path": "/models/tales"}).status_code == 422
    assert stories.post("/v1/unload_lora_adapter", {"lora_name": "verse"}).json()["unloaded"] == [1]
    assert composition(stories, model="verse@1") == ("explicit", {"verse@1": 1.0})  # it loads again when asked for


def test_what_is_listed_can_be_asked_for(stories: Stories) -> None:
    listed = stories.http.get("/v1/models").json()["data"]

    assert [one["id"] for one in listed] == [NAME, *TASKS]
    for one in listed:
        assert stories.complete(model=one["id"], max_tokens=1)["model"] == one["id"]
