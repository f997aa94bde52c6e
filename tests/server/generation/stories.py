"""A real small decoder with a store of adapters for it, and a server over both."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from adapters_store.adapter import Adapter
from adapters_store.backbones import fingerprint
from adapters_store.graph import RelationGraph
from adapters_store.manifest import HeadSpec
from adapters_store.primitives import Entry
from adapters_store.primitives.head import Head
from adapters_store.store import AdapterStore
from server.service import Service
from tests.conftest import SHARED_DATA
from tests.server.tools import live, settings_for

STORIES = SHARED_DATA / "stories260k"
NEEDS_STORIES = [pytest.mark.data, pytest.mark.skipif(not STORIES.exists(), reason="needs ../shared/data")]
NAME = STORIES.name
CONTEXT = 512
LAYERS, HIDDEN, VALUES = 5, 64, 32
TASKS = ("moods", "tales", "verse")  # moods has a head as well
BEGUN = "Once upon a time"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' and not m.tool_call_id %}"
    "{{ raise_exception('a tool message needs tool_call_id') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %} calls {{ c.function.name }} with "
    "{{ c.function.arguments.place }}{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def story_lora(seed: int, rank: int = 4, strength: float = 0.3) -> list[Entry]:
    """Random LoRA entries that change what is told."""
    generator = torch.Generator().manual_seed(seed)

    def entry(layer: int, module: str, width: int) -> Entry:
        tensors = {
            "A": torch.randn(rank, HIDDEN, generator=generator) / HIDDEN**0.5,
            "B": torch.randn(width, rank, generator=generator) * strength,
        }
        return Entry(f"layers.{layer}.self_attn.{module}", "lowrank", tensors, {"scale": 1.0})

    widths = (("q_proj", HIDDEN), ("v_proj", VALUES))
    return [entry(layer, module, width) for layer in range(LAYERS) for module, width in widths]


def make_stories_store(root: Path, tasks: Sequence[str] = TASKS) -> Path:
    """One adapter per task with alias prod, and a graph that relates them."""
    store = AdapterStore(root)
    for seed, task in enumerate(tasks):
        publish_story(root, task, seed, alias="prod")
    edges = {(tasks[i], tasks[(i + 1) % len(tasks)]): 0.6 for i in range(len(tasks))}
    store.publish_graph(RelationGraph.of(dict.fromkeys(tasks), edges).to_json())
    return root


def publish_story(root: Path, name: str, seed: int, **facts: Any) -> str:
    """A new version of an adapter; its reference."""
    manifest = AdapterStore(root).publish(
        Adapter(story_lora(seed), _head(seed) if name == "moods" else None),
        **({"name": name, "task": name, "kind": "lora", "backbone": fingerprint(STORIES, "float32")} | facts),
    )
    return manifest.reference


def _head(seed: int) -> Head:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"weight": torch.randn(2, HIDDEN, generator=generator), "bias": torch.zeros(2)}
    return Head(HeadSpec(labels=("sad", "glad"), tensors={}, pooling="last"), tensors)


def with_template(folder: Path, template: str = TEMPLATE) -> Path:
    """The backbone with a chat template of its own."""
    copy = folder / NAME
    shutil.copytree(STORIES, copy)
    (copy / "chat_template.jinja").write_text(template)
    return copy


class Stories:
    """A running server, and ways to ask it."""

    def __init__(self, url: str, service: Service) -> None:
        self.url = url
        self.service = service
        self.http = httpx.Client(base_url=url, timeout=60)

    def ids(self, text: str = BEGUN) -> list[int]:
        return self.service.backbone.bulk.tokenizer(text)["input_ids"]

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def complete(self, **body: Any) -> Any:
        """The answer of /v1/completions; greedy and short unless told otherwise."""
        return self._answer("/v1/completions", {"model": NAME, "prompt": BEGUN, "temperature": 0} | body)

    def text(self, **body: Any) -> str:
        [choice] = self.complete(**body)["choices"]
        return choice["text"]

    def chat(self, content: str = "Tell me.", **body: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        given = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 16} | body
        return self._answer("/v1/chat/completions", {key: value for key, value in given.items() if value is not None})

    def _answer(self, path: str, body: dict[str, Any]) -> Any:
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    def chunks(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, up to [DONE], which must come last."""
        response = self.post(path, body | {"stream": True})
        assert response.status_code == 200, response.text
        *events, done, nothing = response.text.split("\n\n")
        assert (done, nothing) == ("data: [DONE]", "")
        assert all(event.startswith("data: {") for event in events)
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def sdk(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", **({"max_retries": 0} | options))

    def async_sdk(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", **({"max_retries": 0} | options))

    @property
    def is_empty(self) -> bool:
        """True if nothing is in flight: no call, no sequence, no page, no lease."""
        generator = self.service.generator
        assert generator is not None
        batcher = generator.batcher
        sequences = len(batcher.running) + len(batcher.waiting)
        held = batcher.pool.num_held + self.service.residency.num_held
        return generator.num_active + sequences + held == 0


@contextmanager
def stories_server(folder: Path, backbone: Path = STORIES, **changes: Any) -> Iterator[Stories]:
    """A server with the store of make_stories_store in a folder."""
    store = folder / "store"
    if not store.exists():
        make_stories_store(store)
    settings = settings_for(backbone, store, **({"kv_mb": 16} | changes))
    with live(settings) as (url, service):
        stories = Stories(url, service)
        with stories.http:
            yield stories
