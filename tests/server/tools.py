"""What several of the server's tests need: metrics read back, real sockets, a held engine, bounded waiting."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from adapters_store.backbones import fingerprint
from adapters_store.manifest import Manifest
from adapters_store.store import AdapterStore
from server.app import make_app
from server.config import Settings
from server.protocol import BoundedHeaders
from server.service import Service
from tests.server.tiny import make_adapter

PATIENCE_S = 60.0


def service_of(client: TestClient) -> Service:
    return client.app.state.service


def until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """What the condition gives once that is true; an error if it never is."""
    end = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        pause.wait(0.002)
    raise AssertionError(f"{what} never came true")


async def until_async(condition: Callable[[], Any], what: str = "the condition") -> None:
    for _ in range(200_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError(f"{what} never came true")


def metric(client: TestClient, name: str, **labels: str) -> float:
    """A sample of /metrics; 0 if it is not there."""
    return sample(client.get("/metrics").text, name, **labels)


def sample(text: str, name: str, **labels: str) -> float:
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    found = [one.value for one in samples if one.name == name and labels.items() <= one.labels.items()]
    return sum(found)


@contextmanager
def held_engine(service: Service) -> Iterator[None]:
    """While inside, the engine's thread is busy, so that whatever is asked queues."""
    gate, begun = threading.Event(), threading.Event()
    service.engine.post(lambda: (begun.set(), gate.wait(PATIENCE_S)))
    assert begun.wait(PATIENCE_S)
    try:
        yield
    finally:
        gate.set()


def settings_for(backbone: Path, store: Path, **changes: Any) -> Settings:
    return Settings(**({"store": store, "backbone": str(backbone), "threads": 1, "poll_s": 3600} | changes))


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Service]:
    """A started service without HTTP."""
    service = Service(settings)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


def publish(store_root: Path, backbone: Path, name: str, seed: int, **changes: Any) -> Manifest:
    """An adapter that another program publishes."""
    facts = {"name": name, "task": name, "kind": "lora", "backbone": fingerprint(backbone, "float32")} | changes
    return AdapterStore(store_root).publish(make_adapter(seed), **facts)


@contextmanager
def live(settings: Settings) -> Iterator[tuple[str, Service]]:
    """A real uvicorn on a free port, on a thread: its URL and its service."""
    service = Service(settings)
    config = uvicorn.Config(
        make_app(service), host="127.0.0.1", port=0, log_config=None, access_log=False, http=BoundedHeaders
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive(), "startup")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        thread.join()


class Process:
    """`python -m server` in a process of its own, on a free port; its log lines are JSON and kept."""

    def __init__(self, backbone: Path, store: Path, *flags: str) -> None:
        command = [
            sys.executable, "-m", "server", "--store", str(store), "--backbone", str(backbone), "--threads", "1",
            "--port", "0", "--log-format", "json", *flags,
        ]  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ESPALIER_")}
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.url = until(self._url, "the server's start")

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append(line)
        self._process.stderr.close()

    def _url(self) -> str | None:
        assert self._process.poll() is None, "".join(self.lines)
        found = [line.partition("running on ")[2].split()[0] for line in self.lines if "running on " in line]
        return found[0] if found else None

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        code = self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self.wait()


def address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


def raw_post(url: str, path: str, body: object) -> socket.socket:
    """A connection on which a JSON request was sent, and nothing read yet."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection(address(url), timeout=PATIENCE_S)
    connection.sendall(head.encode() + content)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Whatever comes until the other side closes."""
    pieces = []
    with connection:
        while piece := connection.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)
