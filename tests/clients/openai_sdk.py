"""The `openai` Python SDK against a running server: what its users write, each answer checked.

    CLIENT_BASE_URL=http://127.0.0.1:8000/v1 CLIENT_API_KEY=… python tests/clients/openai_sdk.py

The server's backbone generates and has a chat template, and its store has two tasks. Where the variables name them,
keys without the right to infer and a server whose queue is soon full are tried as well.
"""

import asyncio
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

import openai

URL, KEY = os.environ["CLIENT_BASE_URL"], os.environ.get("CLIENT_API_KEY", "none")
PROMPT = "Once upon a time, there was a little"
MESSAGES = [
    {"role": "system", "content": "You tell short stories."},
    {"role": "user", "content": "Tell me one about a dog."},
]
LONG = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}  # nothing ends it before its length

client = openai.OpenAI(base_url=URL, api_key=KEY)
found = {model.id: (model.model_extra or {})["kind"] for model in client.models.list()}
BACKBONE = next(name for name, kind in found.items() if kind == "backbone")
TASK, OTHER = [name for name, kind in found.items() if kind == "task"][:2]


def refused(kind: type[Exception], call: Callable[[], Any]) -> Any:
    """The error that a call ends with."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, but the call was answered")


def gauge(name: str, url: str = URL) -> float:
    """A number of the server's /metrics."""
    request = urllib.request.Request(f"{url.removesuffix('/v1')}/metrics", headers={"authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split(" ")[0].partition("{")[0] == f"espalier_{name}")


def wait_until_idle(url: str = URL) -> None:
    """Return once no text is being generated and no KV page is held; fail if that never happens."""
    end = time.monotonic() + 30
    while any(gauge(name, url) for name in ("running_sequences", "waiting_sequences", "kv_pages_held")):
        assert time.monotonic() < end, "the server still generates for clients that have left"
        time.sleep(0.02)


def models() -> None:
    one = client.models.retrieve(f"{TASK}@1")

    assert one.id == f"{TASK}@1"
    assert one.owned_by == "espalier"
    assert found[TASK] == "task"


def completion() -> None:
    answer = client.completions.create(model=BACKBONE, prompt=PROMPT, max_tokens=24, temperature=0)

    assert answer.object == "text_completion"
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.completion_tokens <= 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def completion_streams() -> None:
    asked: dict[str, Any] = {"model": TASK, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**asked)

    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))

    told = [chunk for chunk in chunks if chunk.choices]
    assert len(told) > 2, "a stream comes in pieces"
    assert "".join(chunk.choices[0].text for chunk in told) == whole.choices[0].text
    assert told[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.choices[0].finish_reason is None for chunk in told[:-1])
    assert not chunks[-1].choices
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def chat() -> None:
    answer = client.chat.completions.create(
        model=TASK, messages=MESSAGES, max_completion_tokens=24, temperature=0, seed=7
    )
    older = client.chat.completions.create(model=TASK, messages=MESSAGES, max_tokens=24, temperature=0)

    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == older.choices[0].message.content != ""
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.prompt_tokens > 10


def chat_streams() -> None:
    asked: dict[str, Any] = {"model": TASK, "messages": MESSAGES, "max_completion_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)

    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    with client.chat.completions.stream(**asked) as stream:  # the SDK's own accumulator
        events = [event.type for event in stream]
        final = stream.current_completion_snapshot  # get_final_completion() raises for what ended by its length

    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert told[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in told) == whole.choices[0].message.content
    assert told[-1].finish_reason == whole.choices[0].finish_reason
    assert not chunks[-1].choices
    assert chunks[-1].usage == whole.usage
    assert {"content.delta", "content.done"} <= set(events)
    assert final.choices[0].message.content == whole.choices[0].message.content


def several_choices() -> None:
    asked: dict[str, Any] = {"model": BACKBONE, "max_tokens": 12, "temperature": 1.0, "seed": 3}
    prompts = [PROMPT, "The cat"]

    answer = client.completions.create(prompt=prompts, n=3, **asked)
    chat = client.chat.completions.create(messages=MESSAGES, n=4, **asked)
    chunks = list(client.completions.create(prompt=prompts, n=3, stream=True, **asked))

    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.index for choice in chat.choices] == list(range(4))
    assert len({choice.message.content for choice in chat.choices}) > 1, "choices differ, also with a seed"
    ended = [choice for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(choice.index for choice in ended) == list(range(6))
    streamed = dict.fromkeys(range(6), "")
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert list(streamed.values()) == [choice.text for choice in answer.choices], "a seed repeats a text"


def sampling_is_steered() -> None:
    def text(**options: Any) -> str:
        answer = client.completions.create(model=BACKBONE, prompt=PROMPT, max_tokens=48, **options)
        return answer.choices[0].text

    greedy = text(temperature=0)
    assert text(temperature=1, top_p=0.0001, seed=1) == greedy
    assert text(temperature=1, extra_body={"top_k": 1}) == greedy
    assert text(temperature=0, frequency_penalty=2, presence_penalty=2) != greedy
    assert text(temperature=1.5, seed=5) == text(temperature=1.5, seed=5) != text(temperature=1.5, seed=6)


def logprobs() -> None:
    asked: dict[str, Any] = {"model": TASK, "max_tokens": 12, "temperature": 0}

    old = client.completions.create(prompt=PROMPT, logprobs=3, **asked).choices[0]
    new = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **asked).choices[0]
    chunks = list(client.completions.create(prompt=PROMPT, logprobs=3, stream=True, **asked))

    assert len(old.logprobs.tokens) == len(old.logprobs.token_logprobs) == len(old.logprobs.top_logprobs)
    assert all(value <= 0 for value in old.logprobs.token_logprobs)
    tops = zip(old.logprobs.token_logprobs, old.logprobs.top_logprobs, strict=True)
    assert all(max(top.values()) == value and len(top) <= 4 for value, top in tops), "greedy takes the likeliest"
    assert old.logprobs.text_offset[0] == 0
    content = new.logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode(errors="replace") == new.message.content
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in content)
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
    assert [token for one in told if one for token in one.tokens] == old.logprobs.tokens


def stop_strings() -> None:
    asked: dict[str, Any] = {"model": BACKBONE, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[12:15]

    stopped = client.completions.create(**asked, stop=["never in it", stop]).choices[0]
    chunks = list(client.completions.create(**asked, stop=stop, stream=True))

    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == stopped.text


def embeddings() -> None:
    texts = ["a dog", "the big red ball"]

    default = client.embeddings.create(model=TASK, input=texts)  # base64, unless asked for floats
    floats = client.embeddings.create(model=TASK, input=texts, encoding_format="float")
    by_ids = client.embeddings.create(model=TASK, input=[[5, 6, 7], [8]])

    assert [one.index for one in default.data] == [0, 1]
    pairs = zip(default.data, floats.data, strict=True)
    assert all(abs(a - b) < 1e-6 for left, right in pairs for a, b in zip(left.embedding, right.embedding, strict=True))
    assert len(by_ids.data) == 2
    assert default.usage.prompt_tokens == default.usage.total_tokens > 0


def compositions() -> None:
    def answer(model: str, **extras: Any) -> Any:
        body = {"espalier": extras} if extras else None
        return client.chat.completions.create(
            model=model, messages=MESSAGES, max_completion_tokens=16, temperature=0, extra_body=body
        )

    def used(answered: Any) -> dict[str, float]:
        composition = answered.model_extra["espalier"]["composition"]
        return {one["name"]: one["weight"] for one in composition["adapters"]}

    assert used(answer(BACKBONE)) == {}
    assert used(answer(TASK, mode="none")) == {}
    assert used(answer(TASK, mode="single")) == used(answer(f"{TASK}@1")) == {TASK: 1.0}
    assert set(used(answer(TASK))) >= {TASK, OTHER}, "a task is composed with its neighbours"
    assert len(used(answer(TASK, top_k=1))) == 1
    assert used(answer(BACKBONE, adapters={f"{TASK}@1": 0.75, OTHER: 0.25})) == {TASK: 0.75, OTHER: 0.25}
    mixed = answer(BACKBONE, mix={TASK: 1.0, OTHER: 1.0}, explain=True)
    assert mixed.model_extra["espalier"]["composition"]["adapters"][0]["weights_by_layer"]
    bare, alone = (answer(name).choices[0].message.content for name in (BACKBONE, f"{TASK}@1"))
    assert bare != alone, "an adapter changes the text"


def composition_of_a_stream() -> None:
    chunks = list(client.completions.create(
        model=TASK, prompt=PROMPT, max_tokens=8, stream=True, extra_body={"espalier": {"mode": "single"}}
    ))  # fmt: skip

    told = [chunk.model_extra["espalier"] for chunk in chunks if "espalier" in (chunk.model_extra or {})]
    assert len(told) == 1
    assert told[0]["composition"]["adapters"][0]["name"] == TASK
    assert "espalier" in chunks[-1].model_extra


def request_ids() -> None:
    answer = client.completions.create(
        model=BACKBONE, prompt=PROMPT, max_tokens=1, extra_headers={"x-request-id": "order-66"}
    )
    own = client.completions.create(model=BACKBONE, prompt=PROMPT, max_tokens=1)

    assert answer._request_id == "order-66"
    assert own._request_id not in (None, "order-66")


def errors() -> None:
    def create(**changes: Any) -> Any:
        body = {"model": BACKBONE, "messages": MESSAGES, "max_completion_tokens": 4} | changes
        return client.chat.completions.create(**body)

    unknown = refused(openai.NotFoundError, lambda: create(model="nobody"))
    hot = refused(openai.BadRequestError, lambda: create(temperature=9))
    wordy = refused(openai.BadRequestError, lambda: create(messages=[{"role": "user", "content": "word " * 5000}]))
    typo = refused(openai.BadRequestError, lambda: create(extra_body={"temprature": 1}))
    in_stream = refused(openai.NotFoundError, lambda: list(create(model="nobody", stream=True)))
    tools = refused(openai.BadRequestError, lambda: create(
        tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]
    ))  # fmt: skip

    assert unknown.code == in_stream.code == "model_not_found"
    assert unknown.type == "not_found_error"
    assert unknown.request_id
    assert (hot.param, hot.type) == ("temperature", "invalid_request_error")
    assert wordy.code == "context_length_exceeded"
    assert "temprature" in typo.message
    assert "tools" in tools.message


def keys() -> None:
    def call(key: str, model: str) -> Callable[[], Any]:
        other = client.with_options(api_key=key)
        return lambda: other.completions.create(model=model, prompt=PROMPT, max_tokens=2)

    if admin := os.environ.get("CLIENT_ADMIN_KEY"):
        assert refused(openai.PermissionDeniedError, call(admin, BACKBONE)).code == "forbidden"
        assert refused(openai.AuthenticationError, call("esp-wrong", BACKBONE)).code == "unauthorized"
    if limited := os.environ.get("CLIENT_TASK_KEY"):
        assert call(limited, TASK)().choices
        assert OTHER in refused(openai.PermissionDeniedError, call(limited, OTHER)).message


def timeout_ends_the_work() -> None:
    hasty = client.with_options(timeout=0.1, max_retries=0)
    before = gauge("generated_tokens_total")

    refused(openai.APITimeoutError, lambda: hasty.completions.create(model=TASK, prompt=PROMPT, n=64, **LONG))

    wait_until_idle()
    assert gauge("generated_tokens_total") - before < 64 * 400, "it went on after the client had left"


def closed_stream_ends_the_work() -> None:
    before = gauge("generated_tokens_total")

    with client.completions.create(model=TASK, prompt=PROMPT, n=64, stream=True, **LONG) as stream:
        first = next(iter(stream))

    wait_until_idle()
    assert first.choices[0].finish_reason is None
    assert gauge("generated_tokens_total") - before < 64 * 400, "it went on after the client had left"


def full_queue_is_told_and_waited_for() -> None:
    url = os.environ.get("CLIENT_SMALL_QUEUE_URL")
    if url is None:
        return
    small = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    asked: dict[str, Any] = {"model": TASK, "prompt": PROMPT, "max_tokens": 4}

    blocker = small.completions.create(model=TASK, prompt=[PROMPT] * 64, stream=True, **LONG)
    next(iter(blocker))
    error = refused(openai.RateLimitError, lambda: small.completions.create(**asked))
    refused(openai.RateLimitError, lambda: small.completions.create(**asked, stream=True))
    threading.Timer(0.3, blocker.close).start()
    raw = small.with_options(max_retries=5).completions.with_raw_response.create(**asked)

    assert error.code == "overloaded"
    assert int(error.response.headers["retry-after"]) >= 1
    assert raw.retries_taken >= 1, "the SDK tried again by itself"
    assert raw.parse().choices
    wait_until_idle(url)


def many_at_once() -> None:
    def asks() -> Iterable[dict[str, Any]]:
        for number in range(32):
            prompt = PROMPT + " animal and" * (number % 7)
            model = (BACKBONE, TASK, OTHER, f"{TASK}@1")[number % 4]
            yield {"model": model, "prompt": prompt, "max_tokens": 8 + number % 9, "temperature": 0}

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=URL, api_key=KEY) as many:
            answers = await asyncio.gather(*(many.completions.create(**ask) for ask in asks()))
        return [answer.choices[0].text for answer in answers]

    alone = [client.completions.create(**ask).choices[0].text for ask in asks()]

    assert asyncio.run(together()) == alone


def async_stream() -> None:
    async def read() -> str:
        async with openai.AsyncOpenAI(base_url=URL, api_key=KEY) as many:
            stream = await many.chat.completions.create(model=TASK, messages=MESSAGES, max_tokens=8, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    assert asyncio.run(read())


if __name__ == "__main__":
    for check in (
        models, completion, completion_streams, chat, chat_streams, several_choices, sampling_is_steered, logprobs,
        stop_strings, embeddings, compositions, composition_of_a_stream, request_ids, errors, keys,
        timeout_ends_the_work, closed_stream_ends_the_work, full_queue_is_told_and_waited_for, many_at_once,
        async_stream,
    ):  # fmt: skip
        start = time.monotonic()
        print(f"{check.__name__} …", end=" ", flush=True)
        check()
        print(f"{time.monotonic() - start:.2f} s")
    wait_until_idle()
