"""The real small decoder: 64 prompts of mixed length at once, over HTTP, are what transformers' generate gives each."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.generation.text import token_bytes
from tests.server.generation.stories import NAME, NEEDS_STORIES, STORIES, stories_server

pytestmark = NEEDS_STORIES
STORY = "once there was a little girl named Lily who had a big red ball and her dog saw the sun"


def prompts() -> list[str]:
    """From no word at all to 60."""
    rng = random.Random(0)
    return [" ".join(rng.choices(STORY.split(), k=i if i < 8 else rng.randrange(60))) for i in range(64)]


def expected(counts: list[int]) -> list[list[int]]:
    """New tokens of each prompt, by `LlamaForCausalLM.generate` alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
    found = []
    for prompt, count in zip(prompts(), counts, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)
        found.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return found


@pytest.mark.parametrize("kv_mb", [16, 1], ids=["roomy", "tight"])
def test_64_prompts_at_once_are_what_generate_gives_each(tmp_path: Path, kv_mb: int) -> None:
    counts = [10 + i % 41 for i in range(64)]
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    wanted = expected(counts)
    with stories_server(tmp_path, kv_mb=kv_mb, step_tokens=96, max_sequences=64) as stories:
        answers = asyncio.run(_all(stories.url, counts))

    for prompt, tokens, answer in zip(prompts(), wanted, answers, strict=True):
        before = tokenizer(prompt)["input_ids"]
        whole = tokenizer.decode(before + tokens, skip_special_tokens=True)
        assert answer["text"] == whole.removeprefix(tokenizer.decode(before, skip_special_tokens=True))
        ended = answer["finish_reason"] == "stop"
        assert answer["tokens"] == [name(tokenizer, token) for token in tokens[: -1 if ended else None]]
    assert len({answer["text"] for answer in answers}) > 50


def name(tokenizer: Any, token: int) -> str:
    """As the endpoint writes a token: its text, or its bytes if they are no text."""
    found = token_bytes(tokenizer, token)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


async def _all(url: str, counts: list[int]) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=64)) as client:
        asked = zip(prompts(), counts, strict=True)
        return await asyncio.gather(*(_one(client, i, *one) for i, one in enumerate(asked)))


async def _one(client: httpx.AsyncClient, i: int, prompt: str, count: int) -> dict[str, Any]:
    """Text, why it ended, and its tokens by name (from log-probabilities); every other request is streamed."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 0}
    body["stream"] = i % 2 == 0
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    events = response.text.split("\n\n") if body["stream"] else [f"data: {response.text}"]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    names = [name for choice in choices if choice["logprobs"] for name in choice["logprobs"]["tokens"]]
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return {"text": "".join(c["text"] for c in choices), "finish_reason": reasons[-1], "tokens": names}
