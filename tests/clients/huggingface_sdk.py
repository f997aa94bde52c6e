"""`huggingface_hub.InferenceClient` against a running server: chat, streamed and not, each answer checked.

    CLIENT_BASE_URL=http://127.0.0.1:8000/v1 CLIENT_API_KEY=… python tests/clients/huggingface_sdk.py

Chat is the one task for which this client speaks OpenAI's API. Its others (`text_generation`, `feature_extraction`, …)
speak those of TGI and the Inference API, which this server does not have. With HF_HUB_OFFLINE=1 it calls nobody.
"""

import asyncio
import os
import time
from typing import Any

import openai
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError

SERVER = {"base_url": os.environ["CLIENT_BASE_URL"], "api_key": os.environ.get("CLIENT_API_KEY", "none")}
MESSAGES = [{"role": "user", "content": "Tell me a story about a dog."}]

listed = openai.OpenAI(**SERVER).models.list().data
TASK = next(one.id for one in listed if one.model_extra["kind"] == "task")

client = InferenceClient(**SERVER)
ASKED: dict[str, Any] = {"model": TASK, "messages": MESSAGES, "max_tokens": 16, "temperature": 0}


def chat() -> None:
    answer = client.chat_completion(**ASKED)
    same = client.chat.completions.create(**ASKED)  # the name that OpenAI's SDK has for it

    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == same.choices[0].message.content != ""
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.model == TASK
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def chat_streams() -> None:
    whole = client.chat_completion(**ASKED)

    chunks = list(client.chat_completion(**ASKED, stream=True, stream_options={"include_usage": True}))

    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert len(told) > 2
    assert "".join(choice.delta.content or "" for choice in told) == whole.choices[0].message.content
    assert told[-1].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def options() -> None:
    text = client.chat_completion(**ASKED).choices[0].message.content

    stopped = client.chat_completion(**ASKED, stop=[text[6:8]]).choices[0]
    several = client.chat_completion(**ASKED | {"temperature": 1.0}, n=2, seed=1, top_p=0.9, presence_penalty=0.5)
    told = client.chat_completion(**ASKED, logprobs=True, top_logprobs=2).choices[0].logprobs

    assert stopped.message.content == text[: text.index(text[6:8])]
    assert stopped.finish_reason == "stop"
    assert len(several.choices) == 2
    assert len(told.content[0].top_logprobs) == 2


def composition() -> None:
    answer = client.chat_completion(**ASKED, extra_body={"espalier": {"mode": "single"}})

    assert answer.espalier["composition"]["adapters"][0]["name"] == TASK  # fields that it does not know stay


def chat_async() -> None:
    async def both() -> tuple[str, str]:
        async with AsyncInferenceClient(**SERVER) as many:
            whole = await many.chat_completion(**ASKED)
            stream = await many.chat_completion(**ASKED, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        return whole.choices[0].message.content, "".join(pieces)

    whole, streamed = asyncio.run(both())

    assert whole == streamed


def refusal(**changes: Any) -> tuple[int, str]:
    """Status and code of the error that a call ends with."""
    try:
        client.chat_completion(**ASKED | changes)
    except HfHubHTTPError as error:
        return error.response.status_code, error.response.json()["error"]["code"]
    raise AssertionError(f"{changes} was answered")


def errors() -> None:
    assert refusal(model="nobody") == (404, "model_not_found")
    assert refusal(temperature=9.0) == (400, "invalid_request")
    assert refusal(messages=[{"role": "user", "content": "word " * 5000}]) == (400, "context_length_exceeded")


def timeout() -> None:
    hasty = InferenceClient(**SERVER, timeout=0.1)
    try:
        hasty.chat_completion(**ASKED | {"max_tokens": 300}, n=32, extra_body={"ignore_eos": True})
    except InferenceTimeoutError:
        return
    raise AssertionError("9,600 tokens within a tenth of a second")


if __name__ == "__main__":
    for check in (chat, chat_streams, options, composition, chat_async, errors, timeout):
        start = time.monotonic()
        print(f"{check.__name__} …", end=" ", flush=True)
        check()
        print(f"{time.monotonic() - start:.2f} s")
