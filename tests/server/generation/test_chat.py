"""`/v1/chat/completions`: the backbone's own template, whole answers, and what is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from huggingface_hub import InferenceClient
from openai.types import completion_create_params as texts
from openai.types.chat import ChatCompletion
from openai.types.chat import completion_create_params as chats

from server import openai_schema
from server.completions_schema import ChatRequest, CompletionRequest
from tests.server.generation.stories import (
    CONTEXT,
    NAME,
    NEEDS_STORIES,
    TEMPLATE,
    Stories,
    stories_server,
    with_template,
)
from tests.server.test_openapi import assert_said
from tests.server.tools import until

pytestmark = NEEDS_STORIES
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stories]:
    folder = tmp_path_factory.mktemp("chat")
    with stories_server(folder, with_template(folder / "backbone")) as server:
        yield server


def messages(*said: tuple[str, Any], **more: Any) -> list[dict[str, Any]]:
    listed = [{"role": role, "content": content} for role, content in said]
    return [*listed[:-1], listed[-1] | more]


def answered(stories: Stories, prompt: str) -> str:
    """What the model continues a template's text with."""
    ids = stories.service.backbone.bulk.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return stories.text(prompt=ids, max_tokens=16)


def content(answer: Any) -> str:
    [choice] = answer["choices"]
    return choice["message"]["content"]


def test_an_answer_is_what_openais_sdk_and_the_document_say(stories: Stories) -> None:
    answer = stories.chat(model="tales", logprobs=True, top_logprobs=2)

    assert_said(answer, openai_schema.ChatCompletion)
    parsed = ChatCompletion.model_validate(answer)
    assert parsed.id.startswith("chatcmpl-")
    assert parsed.choices[0].message.role == "assistant"
    assert parsed.choices[0].finish_reason == "length"
    assert answer["espalier"]["composition"]["mode"] == "prior"


def test_the_prompt_is_the_templates_with_one_beginning(stories: Stories) -> None:
    answer = stories.chat("Tell me.")

    prompt = "<s>user: Tell me.\nassistant:"
    ids = stories.service.backbone.bulk.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids.count(1) == 1
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert content(answer) == answered(stories, prompt)


def test_every_role_reaches_the_template(stories: Stories) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "the sea"}'}}
    said = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "Sun.", "tool_call_id": "c1"},
    ]

    answer = stories.chat(messages=said)

    prompt = "<s>system: Be kind.\nuser: One.\nTwo.\nassistant:  calls weather with the sea\ntool: Sun.\nassistant:"
    assert content(answer) == answered(stories, prompt)


def test_an_answer_of_the_sdk_can_be_sent_back(stories: Stories) -> None:
    with stories.sdk() as client:
        asked = [{"role": "user", "content": "Tell me."}]
        first = client.chat.completions.create(model=NAME, messages=asked, temperature=0, max_tokens=16)
        said = first.choices[0].message
        for back in (said, said.model_dump(), {"role": "assistant", "content": said.content}):
            more = [*asked, back, {"role": "user", "content": "Go on."}]
            second = client.chat.completions.create(model=NAME, messages=more, temperature=0, max_tokens=16)

            prompt = f"<s>user: Tell me.\nassistant: {said.content}\nuser: Go on.\nassistant:"
            assert second.choices[0].message.content == answered(stories, prompt)


def test_what_the_template_refuses_is_a_400_in_its_words(stories: Stories) -> None:
    response = stories.post(PATH, {"model": NAME, "messages": [{"role": "tool", "content": "Sun."}]})

    assert response.status_code == 400
    assert "a tool message needs tool_call_id" in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == "invalid_input"


@pytest.mark.parametrize(
    ("arguments", "said"), [('{"place": ' + "[" * 900 + "]" * 900 + "}", "refuses"), (r'{"place": "\ud800"}', "half")]
)
def test_calls_that_no_template_can_tell_are_a_400(stories: Stories, arguments: str, said: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [{"role": "user", "content": "One."}, {"role": "assistant", "content": None, "tool_calls": [call]}]

    response = stories.post(PATH, {"model": NAME, "messages": messages})

    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]


def test_a_template_that_breaks_is_a_400_too(stories: Stories) -> None:
    call = {"id": "c1", "type": "function", "function": "no object"}
    said = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "?"}]

    response = stories.post(PATH, {"model": NAME, "messages": said})

    assert response.status_code == 400
    assert "the backbone's chat template refuses these messages" in response.json()["error"]["message"]


def test_without_a_template_the_other_endpoint_is_named(tmp_path: Path) -> None:
    with stories_server(tmp_path) as bare:
        response = bare.post(PATH, {"model": NAME, "messages": messages(("user", "Hello."))})

    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]
    assert "/v1/completions" in response.json()["error"]["message"]


def test_a_template_that_knows_developers_gets_them(tmp_path: Path) -> None:
    template = TEMPLATE + "{# developer #}"
    with stories_server(tmp_path, with_template(tmp_path / "backbone", template)) as knowing:
        answer = knowing.chat(messages=messages(("developer", "Be kind.")))

        assert content(answer) == answered(knowing, "<s>developer: Be kind.\nassistant:")


def test_the_default_limit_is_what_the_context_leaves(stories: Stories) -> None:
    whole = stories.chat(max_tokens=None, ignore_eos=True)
    short = stories.chat(max_tokens=None, max_completion_tokens=3)

    assert whole["usage"]["total_tokens"] == CONTEXT
    assert whole["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 3


def test_logprobs_are_those_of_completions_in_chats_own_form(stories: Stories) -> None:
    ids = stories.service.backbone.bulk.tokenizer("<s>user: Tell me.\nassistant:", add_special_tokens=False)[
        "input_ids"
    ]
    told = stories.complete(prompt=ids, logprobs=3)["choices"][0]["logprobs"]

    answer = stories.chat(logprobs=True, top_logprobs=3)
    without = stories.chat(logprobs=True)["choices"][0]["logprobs"]["content"]
    tokens = answer["choices"][0]["logprobs"]["content"]

    assert [one["token"] for one in tokens] == told["tokens"]
    assert [one["logprob"] for one in tokens] == pytest.approx(told["token_logprobs"], abs=1e-6)
    assert [[likely["token"] for likely in one["top_logprobs"]] for one in tokens] == [
        sorted(one, key=lambda name: -one[name]) for one in told["top_logprobs"]
    ]
    assert b"".join(bytes(one["bytes"]) for one in tokens).decode() == content(answer)
    assert all(one["top_logprobs"] == [] for one in without)
    assert stories.chat()["choices"][0]["logprobs"] is None


def test_choices_of_a_seed_differ_from_each_other_and_come_again(stories: Stories) -> None:
    body = {"n": 3, "temperature": 1, "seed": 5, "max_tokens": 24}

    first, again = stories.chat(**body)["choices"], stories.chat(**body)["choices"]

    assert first == again
    assert [choice["index"] for choice in first] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in first}) == 3


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "function", "content": "a", "name": "f"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "'content' is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"messages": [{"role": "user", "content": "a", "typo": 1}]}, "messages.0.typo: no such field"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "'tool_calls' are the assistant's"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "'image_url'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "'input_audio'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "needs 'text'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "'str'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: this server calls no tools"),
        ({"functions": [{"name": "f"}]}, "functions: "),
        ({"tool_choice": "required"}, "tool_choice: "),
        ({"response_format": {"type": "json_object"}}, "response_format: "),
        ({"modalities": ["text", "audio"]}, "modalities: "),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio: "),
        ({"reasoning_effort": "high"}, "reasoning_effort: "),
        ({"verbosity": "low"}, "verbosity: "),
        ({"web_search_options": {}}, "web_search_options: "),
        ({"moderation": {"model": "m"}}, "moderation: "),
        ({"top_logprobs": 3}, "'top_logprobs' goes with"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "two names of one limit"),
        ({"prompt": "a"}, "prompt: no such field"),
        ({"max_tokens": CONTEXT}, f"the context holds {CONTEXT}"),
        ({"echo": True}, "echo: no such field"),
    ],
)
def test_what_would_change_the_meaning_is_refused_by_name(stories: Stories, body: dict[str, Any], said: str) -> None:
    response = stories.post(PATH, {"model": NAME, "messages": messages(("user", "Hello."))} | body)

    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]
    until(lambda: stories.is_empty)


def test_harmless_fields_of_openais_api_change_nothing(stories: Stories) -> None:
    harmless: dict[str, Any] = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s",
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "parallel_tool_calls": True, "tool_choice": "auto",
        "response_format": {"type": "text"}, "modalities": ["text"], "reasoning_effort": "none", "verbosity": "medium",
        "prediction": {"type": "content", "content": "a"}, "tools": [], "stop": [], "n": 1, "stream": False,
        "prompt_cache_options": {"mode": "implicit"}, "logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0,
    }  # fmt: skip
    nothing = dict.fromkeys([*harmless, "audio", "functions", "web_search_options", "moderation", "function_call"])

    assert content(stories.chat(**harmless)) == content(stories.chat())
    assert stories.post(PATH, {"model": NAME, "messages": messages(("user", "Hi."))} | nothing).status_code == 200


def test_every_field_of_the_sdk_is_known() -> None:
    """A field that the SDK can send is read, ignored or refused by name: never `no such field`."""
    known = set(chats.CompletionCreateParamsStreaming.__annotations__)
    known |= set(chats.CompletionCreateParamsBase.__annotations__)
    assert known <= set(ChatRequest.model_fields)
    assert set(texts.CompletionCreateParamsBase.__annotations__) <= set(CompletionRequest.model_fields)


def test_the_sdk_maps_errors(stories: Stories) -> None:
    with stories.sdk() as client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "word " * 600}])
    with stories.sdk() as client, pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Hi."}])

    assert refused.value.code == "context_length_exceeded"
    assert unknown.value.code == "model_not_found"


def test_the_client_of_hugging_face_is_answered(stories: Stories, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it would not even call this machine
    client = InferenceClient(base_url=f"{stories.url}/v1", api_key="none")
    said = [{"role": "user", "content": "Tell me."}]

    whole = client.chat_completion(said, model="tales", temperature=0, max_tokens=16)
    streamed = client.chat_completion(said, model="tales", temperature=0, max_tokens=16, stream=True)

    pieces = [chunk.choices[0].delta.content or "" for chunk in streamed]
    assert "".join(pieces) == whole.choices[0].message.content == content(stories.chat(model="tales"))
