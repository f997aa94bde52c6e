"""Texts while adapters come, go and change under them, over real HTTP (peers.md T1, T2, T3, T10, T11, T13)."""

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.service import Service
from tests.server.generation.tiny_decoder import LAYERS, NAMES, make_decoder, make_store, upload_files
from tests.server.tiny import multipart
from tests.server.tools import live, settings_for, until, until_async

COUNT = 24


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture
def server(decoder: Path, tmp_path: Path) -> Iterator[tuple[str, Service]]:
    store = make_store(tmp_path / "store", decoder)
    settings = settings_for(decoder, store, slots=18, kv_mb=1, step_tokens=48, max_sequences=40, prefix_cache=True)
    with live(settings) as running:
        yield running


def prompt(i: int) -> list[int]:
    """Sixteen prompts, of which four share a long beginning: what a wrong cache would mix up."""
    return (
        [(11 * k) % 90 + 3 for k in range(34)] + [i + 3]
        if i % 4 == 0
        else [(5 * k + 7 * i) % 90 + 3 for k in range(3 + 2 * i)]
    )


def composition(i: int, version: str = "@1") -> dict[str, Any]:
    """One to four adapters by reference, weights that differ by layer."""
    rng = random.Random(i)
    chosen = rng.sample(NAMES, 1 + i % 4)
    return {name + version: [round(rng.uniform(-0.4, 1.0), 3) for _ in range(LAYERS)] for name in chosen}


def body(i: int, version: str = "@1", **changes: Any) -> dict[str, Any]:
    asked = {"model": "tiny-llama", "prompt": prompt(i % 16), "max_tokens": COUNT, "temperature": 0, "ignore_eos": True}
    return asked | {"espalier": {"adapters": composition(i, version), "explain": True}} | changes


def ask(client: httpx.Client, asked: dict[str, Any]) -> dict[str, Any]:
    response = client.post("/v1/completions", json=asked)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def stream(client: httpx.AsyncClient, asked: dict[str, Any], leave_after: int | None = None) -> tuple[str, Any]:
    """Text and composition of a stream; left early after so many chunks."""
    pieces, extras = [], None
    async with client.stream("POST", "/v1/completions", json=asked | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                pieces += [choice["text"] for choice in chunk["choices"]]
                extras = chunk.get("espalier", extras)
            if leave_after is not None and len(pieces) > leave_after:
                break
    return "".join(pieces), extras


class Operator:
    """Uploads, promotes, rolls back, loads and unloads until told to stop."""

    def __init__(self, url: str, uploads: list[tuple[str, dict[str, bytes]]]) -> None:
        self.rounds = 0
        self._url, self._uploads = url, uploads
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._done = self._pool.submit(self._run)

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._stop.is_set():
                name, files = self._uploads[self.rounds % len(self._uploads)]
                new = self._do(client.post("/v1/adapters", data={"name": name, "task": name}, files=multipart(files)))
                version = new["manifest"]["version"]
                alias = f"/v1/adapters/{name}/aliases/prod"
                self._do(client.put(alias, json={"version": version}))
                self._do(client.post("/v1/unload_lora_adapter", json={"lora_name": f"{name}@{version}"}))
                self._do(client.put(alias, json={"version": 1}))
                self._do(client.post("/v1/load_lora_adapter", json={"lora_name": f"{name}@{version}"}))
                self.rounds += 1

    @staticmethod
    def _do(response: httpx.Response) -> dict[str, Any]:
        assert response.status_code in (200, 201), response.text
        return dict(response.json())

    def stop(self) -> None:
        self._stop.set()
        self._done.result(60)
        self._pool.shutdown()


def is_empty(service: Service) -> bool:
    generator = service.generator
    assert generator is not None
    batcher = generator.batcher
    return not (generator.num_active + batcher.pool.num_held + service.residency.num_held + len(batcher.running))


def test_texts_are_their_own_while_adapters_come_and_go_and_clients_leave(
    server: tuple[str, Service], decoder: Path, tmp_path: Path
) -> None:
    url, service = server
    uploads = [(name, upload_files(tmp_path, decoder, name, 40 + i)) for i, name in enumerate(NAMES[:4])]
    with httpx.Client(base_url=url, timeout=60) as client:
        alone = [ask(client, body(i))["choices"][0]["text"] for i in range(64)]
    operator = Operator(url, uploads)

    async def crowd() -> list[tuple[str, Any]]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            staying = [stream(client, body(i)) for i in range(64)]
            leaving = [stream(client, body(i, max_tokens=60), leave_after=i % 7) for i in range(32)]
            answered = await asyncio.gather(*staying, *leaving)
            return answered[:64]

    try:
        answers = asyncio.run(crowd()) + asyncio.run(crowd())
        until(lambda: operator.rounds >= 4, "four rounds of uploads")
    finally:
        operator.stop()

    assert [text for text, _ in answers] == alone * 2
    for i, (_, extras) in enumerate(answers):
        named = {f"{a['name']}@{a['version']}": a["weights_by_layer"] for a in extras["composition"]["adapters"]}
        wanted = composition(i % 64)
        assert named.keys() == wanted.keys()
        assert all(named[reference] == pytest.approx(weights) for reference, weights in wanted.items())
    assert len(set(alone)) > 55
    assert service.generator is not None
    assert service.generator.batcher.counters.cached_tokens > 0
    until(lambda: is_empty(service), "nothing held")


def test_a_stream_keeps_the_version_it_began_with_and_says_so(
    server: tuple[str, Service], decoder: Path, tmp_path: Path
) -> None:
    url, service = server
    files = upload_files(tmp_path, decoder, "a00", 77)
    asked = body(1, espalier={"adapters": {"a00@prod": 1.0}}, max_tokens=80)
    with httpx.Client(base_url=url, timeout=60) as client:
        client.post("/v1/adapters", data={"name": "a00", "task": "a00"}, files=multipart(files)).raise_for_status()
        alone = {v: ask(client, asked | {"espalier": {"adapters": {f"a00@{v}": 1.0}}}) for v in (1, 2)}
        client.put("/v1/adapters/a00/aliases/prod", json={"version": 2}).raise_for_status()

        async def streamed() -> tuple[str, Any]:
            async with httpx.AsyncClient(base_url=url, timeout=60) as stream_client:
                running = asyncio.create_task(stream(stream_client, asked))
                await until_async(lambda: service.residency.num_held, "the stream's lease")
                rolled_back = await stream_client.put("/v1/adapters/a00/aliases/prod", json={"version": 1})
                assert rolled_back.status_code == 200
                return await running

        text, extras = asyncio.run(streamed())
        later = ask(client, asked)

    assert alone[1]["choices"][0]["text"] != alone[2]["choices"][0]["text"]
    assert (text, extras["composition"]["adapters"][0]["version"]) == (alone[2]["choices"][0]["text"], 2)
    assert later["choices"][0]["text"] == alone[1]["choices"][0]["text"]
    assert later["espalier"]["composition"]["adapters"][0]["version"] == 1


def test_unloading_waits_for_all_choices_of_a_call_and_lets_everything_go(server: tuple[str, Service]) -> None:
    """T11: several choices of one call hold their adapter together and let it go together."""
    url, service = server
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(1) as pool:
        asked = body(0, n=3, max_tokens=60, temperature=1, espalier={"adapters": {"a03": 1.0}})
        answer = pool.submit(ask, client, asked)
        until(lambda: service.residency.num_held)
        with httpx.Client(base_url=url, timeout=60) as other:
            unloaded = other.post("/v1/unload_lora_adapter", json={"lora_name": "a03"})

        assert unloaded.status_code == 200, unloaded.text
        assert [choice["finish_reason"] for choice in answer.result()["choices"]] == ["length"] * 3
        until(lambda: is_empty(service), "nothing held")
        assert ask(client, asked)["choices"][2]["index"] == 2


def test_equal_prompts_under_different_compositions_share_nothing(server: tuple[str, Service]) -> None:
    """T2, T3: one long prompt under a bare backbone, two adapters, two weights and two versions' worth of content."""
    url, _ = server
    long = [(11 * k) % 90 + 3 for k in range(70)]
    ways = [{"mode": "none"}, *({"adapters": {name: w}} for name in ("a02", "a04", "a06") for w in (1.0, 0.5))]
    with httpx.Client(base_url=url, timeout=60) as client:
        first = [ask(client, body(0, prompt=long, espalier=way)) for way in ways]
        again = [ask(client, body(0, prompt=long, espalier=way)) for way in ways]

    def cached(answers: list[dict[str, Any]]) -> list[int]:
        return [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]

    assert cached(first) == [0] * 7
    assert cached(again) == [64] * 7
    texts = [answer["choices"][0]["text"] for answer in first]
    assert texts == [answer["choices"][0]["text"] for answer in again]
    assert len(set(texts)) == 7
