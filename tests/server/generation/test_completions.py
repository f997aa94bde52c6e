"""`/v1/completions`: prompts of every form, whole answers, their log-probabilities, and what is refused."""

import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from openai.types import Completion
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM

from server import openai_schema
from server.generation.pages import PAGE
from tests.server.generation.stories import BEGUN, CONTEXT, NAME, NEEDS_STORIES, STORIES, Stories, stories_server
from tests.server.test_openapi import assert_said
from tests.server.test_security import make_key
from tests.server.tools import held_engine, until

pytestmark = NEEDS_STORIES


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stories]:
    with stories_server(tmp_path_factory.mktemp("completions"), queue_tokens=64) as server:
        yield server


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(STORIES).eval()


def test_an_answer_is_what_openais_sdk_and_the_document_say(stories: Stories) -> None:
    answer = stories.complete(model="tales", logprobs=2, espalier={"explain": True})

    assert_said(answer, openai_schema.Completion)
    parsed = Completion.model_validate(answer)
    assert parsed.id.startswith("cmpl-")
    assert parsed.object == "text_completion"
    assert parsed.model == "tales"
    assert parsed.choices[0].finish_reason == "length"
    assert answer["espalier"]["composition"]["adapters"][0]["weights_by_layer"]


def test_greedy_text_is_that_of_transformers_and_costs_16_tokens_by_default(stories: Stories, reference: Any) -> None:
    answer = stories.complete()
    ids = stories.ids()

    generated = reference.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=16)[0].tolist()
    tokenizer = stories.service.backbone.bulk.tokenizer
    expected = tokenizer.decode(generated).removeprefix(tokenizer.decode(ids))
    assert answer["choices"][0]["text"] == expected
    assert answer["usage"] == {
        "prompt_tokens": len(ids), "completion_tokens": 16, "total_tokens": len(ids) + 16,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip


def test_a_prompt_may_be_a_text_or_tokens_alone_or_in_lists(stories: Stories) -> None:
    other = "The cat"
    one, two = stories.text(), stories.text(prompt=other)

    def texts(prompt: Any) -> list[str]:
        return [choice["text"] for choice in stories.complete(prompt=prompt)["choices"]]

    assert one != two
    assert texts([BEGUN]) == texts(stories.ids()) == texts([stories.ids()]) == [one]
    assert texts([BEGUN, other]) == texts([stories.ids(), stories.ids(other)]) == [one, two]
    assert texts("") == texts(stories.ids(""))


def test_choices_of_a_seed_differ_from_each_other_and_come_again(stories: Stories) -> None:
    body = {"n": 3, "temperature": 1, "seed": 7, "max_tokens": 24}
    first, again = stories.complete(**body), stories.complete(**body)

    texts = [choice["text"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice["text"] for choice in again["choices"]]
    assert stories.text(**body | {"n": 1, "seed": 8}) not in texts
    assert first["usage"]["prompt_tokens"] == len(stories.ids())
    assert first["usage"]["completion_tokens"] == 72


def test_choices_compute_their_prompt_once(stories: Stories) -> None:
    counters = stories.service.generator.batcher.counters
    before = counters.tokens
    ids = [*stories.ids(), *range(300, 300 + 32)]

    answer = stories.complete(prompt=ids, n=4, temperature=1, seed=3, max_tokens=3)

    left = (len(ids) - 1) % PAGE + 1  # behind the last page that all of it fill
    assert counters.tokens - before == len(ids) + 3 * left + 4 * 2
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}, "the first choice found nothing"


def test_choices_of_several_prompts_come_prompt_by_prompt(stories: Stories) -> None:
    prompts = [BEGUN, "The cat", "A big dog"]

    choices = stories.complete(prompt=prompts, n=2, max_tokens=8)["choices"]

    alone = [stories.text(prompt=prompt, max_tokens=8) for prompt in prompts]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert [choice["text"] for choice in choices] == [text for text in alone for _ in range(2)]


def test_a_text_ends_before_a_stop_string_also_one_across_tokens(stories: Stories) -> None:
    whole = stories.complete(max_tokens=32, logprobs=0)["choices"][0]
    begins = whole["logprobs"]["text_offset"]
    stop = whole["text"][begins[9] + 1 : begins[11] + 1]  # from inside a token to inside the next but one

    [choice] = stories.complete(max_tokens=32, stop=stop, logprobs=0)["choices"]
    [several] = stories.complete(max_tokens=32, stop=["no such text", stop])["choices"]

    assert choice["text"] == several["text"] == whole["text"][: whole["text"].index(stop)]
    assert choice["finish_reason"] == several["finish_reason"] == "stop"
    assert choice["logprobs"]["text_offset"] == begins[: len(choice["logprobs"]["tokens"])]


def test_tokens_end_a_text_unless_the_end_is_to_be_ignored(stories: Stories) -> None:
    end = stories.service.backbone.bulk.tokenizer.eos_token_id
    third = stories.complete(logprobs=0)["choices"][0]

    ended = stories.complete(logit_bias={str(end): 100})
    ignored = stories.complete(logit_bias={str(end): 100}, ignore_eos=True)
    stopped = stories.complete(stop_token_ids=[_token(stories, third["logprobs"]["tokens"][2])])

    assert (ended["choices"][0]["text"], ended["choices"][0]["finish_reason"]) == ("", "stop")
    assert ended["usage"]["completion_tokens"] == 1
    assert ignored["choices"][0]["finish_reason"] == "length"
    assert stopped["choices"][0]["text"] == third["text"][: third["logprobs"]["text_offset"][2]]
    assert stopped["choices"][0]["finish_reason"] == "stop"


def _token(stories: Stories, text: str) -> int:
    tokenizer = stories.service.backbone.bulk.tokenizer
    return tokenizer.convert_tokens_to_ids(text.replace(" ", "▁"))


def test_sampling_settings_reach_the_engine(stories: Stories) -> None:
    greedy = stories.text(max_tokens=24)
    hot = {"temperature": 2, "max_tokens": 24, "seed": 1}

    assert stories.text(**hot) != greedy
    for narrow in ({"top_k": 1}, {"min_p": 1}, {"top_p": 0}, {"temperature": 1e-6}):
        assert stories.text(**hot | narrow) == greedy, narrow
    assert stories.text(**hot, top_k=-1) == stories.text(**hot, top_k=0) == stories.text(**hot)
    for changed in ({"repetition_penalty": 2}, {"presence_penalty": 2}, {"frequency_penalty": 2}):
        assert stories.text(max_tokens=64, **changed) != stories.text(max_tokens=64), changed
    first = str(_token(stories, stories.complete(logprobs=0)["choices"][0]["logprobs"]["tokens"][0]))
    assert stories.text(logit_bias={first: -100}) != stories.text()


def test_logprobs_are_the_models_own(stories: Stories, reference: Any) -> None:
    [choice] = stories.complete(logprobs=3, max_tokens=8)["choices"]
    told = choice["logprobs"]
    ids = stories.ids() + [_token(stories, name) for name in told["tokens"]]

    with torch.no_grad():
        rows = torch.log_softmax(reference(torch.tensor([ids])).logits[0], -1)[len(stories.ids()) - 1 : -1]
    values, _ = rows.topk(3)
    assert told["token_logprobs"] == pytest.approx(values[:, 0].tolist(), abs=1e-4)
    assert [sorted(one.values(), reverse=True) for one in told["top_logprobs"]] == [
        pytest.approx(row.tolist(), abs=1e-4) for row in values
    ]
    assert [one[name] for one, name in zip(told["top_logprobs"], told["tokens"], strict=True)] == told["token_logprobs"]
    begins = [*told["text_offset"], len(choice["text"])]
    assert [choice["text"][a:b] for a, b in itertools.pairwise(begins)] == told["tokens"]


def test_a_token_that_is_not_among_the_likely_ones_is_told_with_them(stories: Stories) -> None:
    [choice] = stories.complete(logprobs=1, temperature=2, seed=3, max_tokens=32)["choices"]
    told = choice["logprobs"]

    assert {len(one) for one in told["top_logprobs"]} == {1, 2}
    assert all(name in one for one, name in zip(told["top_logprobs"], told["tokens"], strict=True))


def test_bytes_that_are_no_text_alone_have_a_name_and_a_place(stories: Stories) -> None:
    tokenizer = stories.service.backbone.bulk.tokenizer
    whole = set(range(len(tokenizer))) - set(tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>"]))

    [choice] = stories.complete(logprobs=2, max_tokens=8, logit_bias={str(token): -100 for token in whole})["choices"]

    assert set(choice["logprobs"]["tokens"]) <= {"bytes:\\xc3", "bytes:\\xa9"}
    assert choice["logprobs"]["text_offset"] == sorted(choice["logprobs"]["text_offset"])
    assert all(offset <= len(choice["text"]) for offset in choice["logprobs"]["text_offset"])
    json.dumps(choice["text"]).encode("ascii")
    choice["text"].encode()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": None}, "prompt: send a text"),
        ({"prompt": []}, "none may be empty"),
        ({"prompt": [[]]}, "none may be empty"),
        ({"prompt": ["a", 5]}, "prompt: send a text"),
        ({"prompt": [True]}, "prompt: send a text"),
        ({"prompt": [512]}, "between 0 and 511"),
        ({"prompt": [-1]}, "between 0 and 511"),
        ({"prompt": ["a"] * 600, "n": 2}, "--max-inputs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n:"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"logit_bias": {"512": 1}}, "token 512"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "at most 16"),
        ({"echo": True}, "echo: prompts are not repeated"),
        ({"suffix": "end"}, "suffix: this server continues"),
        ({"best_of": 2}, "'best_of'"),
        ({"n": 2, "best_of": 3}, "'best_of'"),
        ({"min_tokens": 5}, "min_tokens: "),
        ({"stream_options": {"include_usage": True}}, "'stream_options' goes with"),
        ({"guided_json": {}, "typo": 1}, "guided_json, typo: no such field"),
        ({"espalier": {"typo": 1}}, "espalier.typo: no such field"),
        ({"lora": [{"id": "tales", "scale": 1, "weight": 1}]}, "lora.0.weight: no such field"),
    ],
)
def test_what_cannot_be_answered_is_a_400_that_says_why(stories: Stories, body: dict[str, Any], said: str) -> None:
    response = stories.post("/v1/completions", {"model": NAME, "prompt": BEGUN} | body)

    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"
    until(lambda: stories.is_empty)


def test_half_a_character_is_a_400(stories: Stories) -> None:
    body = json.dumps({"model": NAME, "prompt": "a \ud800"})

    response = stories.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})

    assert response.status_code == 400, response.text
    assert "half a character" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"echo": False}, {"suffix": None}, {"suffix": ""}, {"best_of": 1}, {"n": 2, "best_of": 2}, {"user": "me"},
        {"stop": None}, {"stop": []}, {"max_tokens": None}, {"logprobs": None}, {"n": None}, {"stream": False},
        {"logit_bias": {}}, {"seed": -1}, {"seed": None}, {"min_tokens": 0}, {"stream_options": None}, {"top_p": None},
    ],
)  # fmt: skip
def test_what_changes_nothing_may_be_sent(stories: Stories, body: dict[str, Any]) -> None:
    assert stories.complete(**body)["choices"][0]["text"] == stories.text()


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [5] * CONTEXT},
        {"prompt": [5] * CONTEXT, "max_tokens": 1},
        {"prompt": [5] * 500, "max_tokens": 13},
        {"prompt": "long " * 5000},
        {"max_tokens": CONTEXT},
    ],
)
def test_what_the_context_does_not_hold_has_an_error_of_its_own(stories: Stories, body: dict[str, Any]) -> None:
    with stories.sdk() as client, pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**{"model": NAME, "prompt": BEGUN} | body)

    assert refused.value.code == "context_length_exceeded"
    assert str(CONTEXT) in refused.value.message


def test_a_prompt_that_fits_is_continued_to_the_end_of_the_context(stories: Stories) -> None:
    full = stories.complete(prompt=[5] * 500, max_tokens=12, ignore_eos=True)
    rest = stories.complete(prompt=[5] * 505, ignore_eos=True)

    assert full["usage"]["total_tokens"] == rest["usage"]["total_tokens"] == CONTEXT
    assert full["choices"][0]["finish_reason"] == rest["choices"][0]["finish_reason"] == "length"


def test_a_backbone_that_makes_no_text_says_so(client: TestClient) -> None:
    for body in ({}, {"model": "books", "prompt": "a"}):
        response = client.post("/v1/completions", json=body)

        assert response.status_code == 404
        assert response.json()["error"]["code"] == "no_generation"
        assert "/v1/embeddings" in response.json()["error"]["message"]


def test_the_sdk_maps_errors_with_their_code_and_request_id(stories: Stories) -> None:
    with stories.sdk() as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.completions.create(model="nobody", prompt="a")
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model=NAME, prompt="a", extra_body={"espalier": {"adapters": {"tales": [1.0]}}})
        raw = client.completions.with_raw_response.create(
            model=NAME, prompt="a", extra_headers={"x-request-id": "my-1"}
        )

    assert unknown.value.code == "model_not_found"
    assert len(str(unknown.value.request_id)) == 32
    assert "layers" in bad.value.message
    assert raw.request_id == "my-1"
    assert raw.parse().id == "cmpl-my-1"


def test_a_full_queue_is_a_429_with_retry_after(stories: Stories) -> None:
    with held_engine(stories.service), stories.sdk() as client:
        thread = threading.Thread(target=stories.complete, kwargs={"prompt": [5] * 60})
        thread.start()
        until(lambda: stories.service.generator.waiting_tokens == 60)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=NAME, prompt=[5] * 60)
    thread.join()

    assert refused.value.code == "overloaded"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    until(lambda: stories.is_empty)


def test_a_client_that_leaves_takes_its_text_along(stories: Stories) -> None:
    batcher = stories.service.generator.batcher
    before = batcher.counters.tokens

    with held_engine(stories.service), stories.sdk(timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
        client.completions.create(model="tales", prompt=BEGUN, max_tokens=400, n=8, extra_body={"ignore_eos": True})
    until(lambda: stories.is_empty)

    assert batcher.counters.tokens - before < 8 * 400  # it was given up, not finished for nobody


def test_a_key_generates_for_its_own_tasks(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("keys")
    key_file = folder / "keys.json"
    own = make_key(key_file, "teller", "--task", "tales")
    admin = make_key(key_file, "admin", "--scope", "admin")
    with stories_server(folder, api_keys=key_file) as stories:

        def asked(headers: dict[str, str] | None, **body: Any) -> tuple[int, str]:
            response = stories.post("/v1/completions", {"model": NAME, "prompt": BEGUN} | body, headers=headers)
            return response.status_code, response.json().get("error", {}).get("code", "")

        assert asked(None) == (401, "unauthorized")
        assert asked(admin) == (403, "forbidden")
        assert asked(own) == asked(own, model="tales") == asked(own, model="tales@1") == (200, "")
        assert asked(own, model="verse") == asked(own, model="verse@1") == (403, "forbidden")
        assert asked(own, model=f"{NAME}:verse") == (403, "forbidden")
        assert asked(own, lora=[{"id": "verse", "scale": 1}]) == (403, "forbidden")
        assert asked(own, espalier={"mix": {"verse": 1, "tales": 1}}) == (403, "forbidden")
        assert [one["path"] for one in stories.http.get("/lora-adapters", headers=own).json()] == ["tales"]
