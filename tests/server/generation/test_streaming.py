"""Streams of both endpoints: the same text as at once, in pieces; how they begin, end, fail and are given up."""

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from server.generation.text import TextStream
from tests.server.generation.stories import BEGUN, NAME, NEEDS_STORIES, Stories, stories_server, with_template
from tests.server.tools import held_engine, raw_post, until

pytestmark = NEEDS_STORIES
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
SAID = [{"role": "user", "content": "Tell me."}]
ASK: dict[str, dict[str, Any]] = {
    TEXT: {"model": NAME, "prompt": BEGUN, "temperature": 0, "max_tokens": 24},
    CHAT: {"model": NAME, "messages": SAID, "temperature": 0, "max_tokens": 24},
}
MODEL: dict[str, Any] = {TEXT: Completion, CHAT: ChatCompletionChunk}


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stories]:
    folder = tmp_path_factory.mktemp("streaming")
    with stories_server(folder, with_template(folder / "backbone")) as server:
        yield server


def piece(choice: dict[str, Any]) -> str:
    return choice["text"] if "text" in choice else choice["delta"].get("content") or ""


def joined(chunks: list[dict[str, Any]]) -> dict[int, tuple[str, str]]:
    """Text and finish reason of each choice."""
    texts: defaultdict[int, str] = defaultdict(str)
    reasons = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        assert choice["index"] not in reasons, "nothing comes behind the end"
        texts[choice["index"]] += piece(choice)
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    return {index: (text, reasons[index]) for index, text in texts.items()}


def at_once(stories: Stories, path: str, body: dict[str, Any]) -> dict[int, tuple[str, str]]:
    choices = stories.post(path, body).json()["choices"]
    return {
        one["index"]: (one["text"] if "text" in one else one["message"]["content"], one["finish_reason"])
        for one in choices
    }


def test_a_tokenizer_that_fails_ends_its_own_call_only(stories: Stories, monkeypatch: pytest.MonkeyPatch) -> None:
    feed, whole = TextStream.feed, at_once(stories, TEXT, ASK[TEXT])
    bad = "A bad"

    def failing(self: TextStream, token: int) -> str:
        if self in broken:
            raise TypeError("no such token")
        return feed(self, token)

    init, broken = TextStream.__init__, []
    bad_ids = stories.ids(bad)

    def noted(self: TextStream, tokenizer: Any, prompt_ids: Any, stop: Any = ()) -> None:
        init(self, tokenizer, prompt_ids, stop)
        if list(prompt_ids) == bad_ids:
            broken.append(self)

    monkeypatch.setattr(TextStream, "__init__", noted)
    monkeypatch.setattr(TextStream, "feed", failing)
    with ThreadPoolExecutor() as pool, held_engine(stories.service):
        good, failed = (pool.submit(stories.post, TEXT, ASK[TEXT] | {"prompt": p}) for p in (BEGUN, bad))
        until(lambda: stories.service.generator.num_active == 2)

    assert failed.result().status_code == 500
    assert joined([good.result().json()]) == whole
    until(lambda: stories.is_empty)


@pytest.mark.parametrize("path", ASK)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"model": "tales"},
        {"stop": [". ", "\n"]},
        {"n": 3, "temperature": 1, "seed": 3},
        {"temperature": 1.5, "seed": 1, "max_tokens": 120},
        {"max_tokens": 1},
    ],
)
def test_a_stream_is_the_text_in_pieces(stories: Stories, path: str, more: dict[str, Any]) -> None:
    chunks = stories.chunks(path, ASK[path] | more)

    assert joined(chunks) == at_once(stories, path, ASK[path] | more)
    for chunk in chunks:
        MODEL[path].model_validate(chunk if path == CHAT else _whole(chunk))
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)


def _whole(chunk: dict[str, Any]) -> dict[str, Any]:
    """The SDK's type has no null for the finish reason, though OpenAI sends it in all chunks but the last."""
    return chunk | {"choices": [one | {"finish_reason": one["finish_reason"] or "stop"} for one in chunk["choices"]]}


def test_the_pieces_of_a_chat_are_role_text_and_end(stories: Stories) -> None:
    first, *middle, last = [chunk["choices"][0] for chunk in stories.chunks(CHAT, ASK[CHAT])]

    assert first["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert all(set(one["delta"]) == {"content"} and one["delta"]["content"] for one in middle)
    assert (last["delta"], last["finish_reason"]) == ({}, "length")
    assert {one["finish_reason"] for one in (first, *middle)} == {None}
    assert len(middle) > 10


@pytest.mark.parametrize("path", ASK)
def test_the_composition_is_in_the_last_chunk_and_only_there(stories: Stories, path: str) -> None:
    for more in ({}, {"stream_options": {"include_usage": True}}, {"n": 2}, {"espalier": {"explain": True}}):
        *before, last = stories.chunks(path, ASK[path] | {"model": "tales"} | more)

        assert not any("espalier" in chunk for chunk in before)
        first = last["espalier"]["composition"]["adapters"][0]
        assert first["name"] == "tales"
        assert ("weights_by_layer" in first) == ("espalier" in more)


@pytest.mark.parametrize("path", ASK)
def test_usage_comes_behind_the_text_if_it_is_wanted(stories: Stories, path: str) -> None:
    body = ASK[path] | {"n": 2}
    *before, last = stories.chunks(path, body | {"stream_options": {"include_usage": True}})
    without = stories.chunks(path, body | {"stream_options": {"include_usage": False}})

    assert last["choices"] == []
    assert last["usage"] == stories.post(path, body).json()["usage"]
    assert all(chunk["usage"] is None for chunk in before)
    assert not any("usage" in chunk for chunk in without)


def test_logprobs_in_pieces_are_those_of_the_whole(stories: Stories) -> None:
    [text] = stories.post(TEXT, ASK[TEXT] | {"logprobs": 2}).json()["choices"]
    [chat] = stories.post(CHAT, ASK[CHAT] | {"logprobs": True, "top_logprobs": 2}).json()["choices"]

    texts = [chunk["choices"][0]["logprobs"] for chunk in stories.chunks(TEXT, ASK[TEXT] | {"logprobs": 2})]
    chats = stories.chunks(CHAT, ASK[CHAT] | {"logprobs": True, "top_logprobs": 2})

    for name in ("tokens", "text_offset"):
        assert [one for part in texts for one in part[name]] == text["logprobs"][name]
    assert [v for part in texts for v in part["token_logprobs"]] == pytest.approx(text["logprobs"]["token_logprobs"])
    told = [chunk["choices"][0]["logprobs"] for chunk in chats]
    tokens = [one for part in told if part for one in part["content"]]
    assert [one["token"] for one in tokens] == [one["token"] for one in chat["logprobs"]["content"]]
    assert [len(one["top_logprobs"]) for one in tokens] == [2] * len(tokens)


def test_characters_are_never_broken(stories: Stories) -> None:
    """Random bytes: most are no text, some are characters of two bytes that come in two tokens."""
    tokenizer = stories.service.backbone.bulk.tokenizer
    wanted = set(tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in (0xC3, 0xA9, 0xB6, 0x61)]))
    bias = {str(token): -100 for token in range(len(tokenizer)) if token not in wanted}
    body = ASK[TEXT] | {"logit_bias": bias, "temperature": 2, "seed": 4, "max_tokens": 200}

    chunks = stories.chunks(TEXT, body)

    pieces = [piece(chunk["choices"][0]) for chunk in chunks]
    [(whole, _)] = at_once(stories, TEXT, body).values()
    assert "".join(pieces) == whole
    assert set(whole) <= set("aéö\ufffd")
    assert {"é", "ö"} & set(whole)


@pytest.mark.parametrize("path", ASK)
def test_nobody_on_the_way_may_keep_a_stream(stories: Stories, path: str) -> None:
    headers = stories.post(path, ASK[path] | {"stream": True}).headers

    assert headers["content-type"].partition(";")[0] == "text/event-stream"
    assert headers["cache-control"] == "no-store"
    assert headers["x-accel-buffering"] == "no"
    assert "content-length" not in headers
    assert len(headers["x-request-id"]) == 32


@pytest.mark.parametrize("path", ASK)
@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"model": "nobody"}, 404),
        ({"max_tokens": 10_000}, 400),
        ({"typo": 1}, 400),
        ({"lora": [{"id": 5, "scale": 1}]}, 400),
    ],
)
def test_an_error_before_the_first_piece_is_an_ordinary_one(
    stories: Stories, path: str, more: dict[str, Any], status: int
) -> None:
    response = stories.post(path, ASK[path] | {"stream": True} | more)

    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("path", ASK)
def test_an_error_in_the_middle_is_the_last_event(stories: Stories, path: str) -> None:
    """The server stops before the text is finished."""
    service = stories.service
    body = ASK[path] | {"stream": True, "max_tokens": 400, "ignore_eos": True}

    with stories.http.stream("POST", path, json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        begun = next(lines)
        loop = service._polling.get_loop()
        loop.call_soon_threadsafe(service.generator.stop)
        rest = list(lines)

    assert json.loads(begun.removeprefix("data: "))["choices"]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "draining"
    assert "[DONE]" not in rest[-1]
    until(lambda: stories.is_empty)


def test_the_sdk_raises_an_error_in_the_middle(stories: Stories) -> None:
    service = stories.service
    with stories.sdk() as client:
        stream = client.completions.create(
            model=NAME, prompt=BEGUN, stream=True, max_tokens=400, extra_body={"ignore_eos": True}
        )
        next(stream)
        loop = service._polling.get_loop()
        loop.call_soon_threadsafe(service.generator.stop)
        with pytest.raises(openai.APIError) as failed:
            list(stream)

    assert failed.value.code == "draining"
    until(lambda: stories.is_empty)


@pytest.mark.parametrize("path", ASK)
@pytest.mark.parametrize("when", ["before the first piece", "in the middle"])
def test_a_client_that_leaves_takes_its_text_along(stories: Stories, path: str, when: str) -> None:
    batcher = stories.service.generator.batcher
    before = batcher.counters.tokens
    body = ASK[path] | {"model": "tales", "stream": True, "n": 8, "max_tokens": 400, "ignore_eos": True}

    if when == "in the middle":
        with raw_post(stories.url, path, body) as connection:
            assert connection.recv(100)
    else:
        with held_engine(stories.service):
            with raw_post(stories.url, path, body):
                until(lambda: len(stories.service.generator._owner) == 8)
            until(lambda: not stories.service.generator._owner)  # its text belongs to nobody any more
    until(lambda: stories.is_empty)

    assert batcher.counters.tokens - before < 8 * 400  # it was given up, not finished for nobody


def test_the_sdk_streams(stories: Stories) -> None:
    [(text, _)] = at_once(stories, TEXT, ASK[TEXT]).values()
    [(chat, _)] = at_once(stories, CHAT, ASK[CHAT]).values()
    with stories.sdk() as client:
        texts = list(client.completions.create(**ASK[TEXT], stream=True))
        chats = list(client.chat.completions.create(**ASK[CHAT], stream=True, stream_options={"include_usage": True}))
        raw = client.chat.completions.with_raw_response.create(**ASK[CHAT], stream=True)
        first = next(iter(raw.parse()))

    assert "".join(chunk.choices[0].text for chunk in texts) == text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chats if chunk.choices) == chat
    assert chats[-1].usage.completion_tokens == 24
    assert texts[-1].model_dump()["espalier"]["composition"]["mode"] == "none"
    assert first.id == f"chatcmpl-{raw.request_id}"
    until(lambda: stories.is_empty)


def test_the_sdk_collects_a_chat(stories: Stories) -> None:
    [(chat, _)] = at_once(stories, CHAT, ASK[CHAT]).values()
    stop = chat[len(chat) // 2 :][:5]  # the SDK takes a text that ends for its length for a failure
    with stories.sdk() as client, client.chat.completions.stream(**ASK[CHAT], stop=stop) as stream:
        final = stream.get_final_completion()

    assert final.choices[0].message.content == chat[: chat.index(stop)]
    assert final.choices[0].finish_reason == "stop"


async def _many(stories: Stories, count: int) -> list[str]:
    async with stories.async_sdk() as client:

        async def one() -> str:
            stream = await client.chat.completions.create(**ASK[CHAT], stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        return await asyncio.gather(*(one() for _ in range(count)))


def test_the_asynchronous_sdk_streams_many_at_once(stories: Stories) -> None:
    [(chat, _)] = at_once(stories, CHAT, ASK[CHAT]).values()

    assert asyncio.run(_many(stories, 16)) == [chat] * 16
    until(lambda: stories.is_empty)
