"""The server end to end over HTTP at saturation, over its own engine alone in the same process.

all-MiniLM-L6-v2, 16 tasks with random LoRA r=8 on all six linear layers, compositions of 4 by the graph, real short
texts. The engine alone runs the same rows, tokenized and composed beforehand, in batches of the same token budget, one
after another. The client is a second process with plain sockets. Rounds alternate.
Run: python -m tests.bench.end_to_end [--seconds 6] [--rounds 3] [--threads 1]
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn
import uvloop
from rich.console import Console
from rich.table import Table

from adapters_store.adapter import Adapter
from adapters_store.graph import RelationGraph
from adapters_store.manifest import HeadSpec
from adapters_store.primitives.head import Head
from adapters_store.store import AdapterStore
from server import backbone, inference
from server.app import make_app
from server.config import Settings
from server.engine import Row
from server.schemas import InferRequest
from server.service import Service
from tests.bench.forward import random_lora
from tests.bench.load_client import TASKS, calls
from tests.bench.rounds import write

SHAPES = ((1, 64), (1, 256), (8, 16), (32, 8))  # inputs per call, calls in flight


def make_store(root: Path, served: backbone.Served) -> None:
    """16 random adapters with heads, and a ring of relations that gives compositions of four."""
    generator, store = torch.Generator().manual_seed(0), AdapterStore(root)
    for task in TASKS:
        tensors = {"weight": torch.randn(4, served.encoder.hidden_size, generator=generator)}
        head = Head(HeadSpec(labels=("a", "b", "c", "d"), tensors={}), tensors)
        adapter = Adapter(random_lora(served.encoder, 8, generator), head)
        store.publish(adapter, name=task, task=task, kind="lora", backbone=served.fingerprint)
    edges = {(TASKS[i], TASKS[(i + step) % 16]): 0.8 for i in range(16) for step in (1, 2, 3)}
    knobs = {"c": 0.6, "neighbours": 4}
    store.publish_graph(RelationGraph.of(dict.fromkeys(TASKS), edges, knobs=knobs).to_json())


class Server:
    """A real uvicorn with a service, on a thread of this process."""

    def __init__(self, settings: Settings, served: backbone.Served) -> None:
        self.service = Service(settings, served)
        config = uvicorn.Config(
            make_app(self.service), host="127.0.0.1", port=0, log_config=None, access_log=False, http="httptools"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.loop = uvloop.new_event_loop()  # what uvicorn takes where it is installed
        self.loop.run_until_complete(self._server.serve())

    def __enter__(self) -> "Server":
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def await_(self, work: Any) -> Any:
        """Run a coroutine on the server's loop from here."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()


def engine_alone(server: Server, seconds: float) -> float:
    """Texts per second of the engine by itself."""
    service = server.service
    batches = server.await_(_prepared(service))
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for rows in batches:
            server.await_(service.engine.run(lambda rows=rows: service.engine.forward(rows)))
            done += len(rows)
    return done / (time.perf_counter() - start)


async def _prepared(service: Service) -> list[list[Row]]:
    """Rows of the same calls, composed, tokenized, cut into batches of the token budget."""
    rows: list[Row] = []
    for body in calls(32, 24):
        asked = inference.rows_of(service, InferRequest.model_validate(body), None)
        ids = service.backbone.tokenize([one.text for one in asked], [None] * len(asked))
        lease = await service.residency.lease(
            list({m.digest: m for one in asked for m in one.composed.manifests}.values())
        )
        for one, tokens in zip(asked, ids, strict=True):
            rows.append(Row(tokens, inference.mix_of(one.composed, lease), one.pooling, lease.head(one.composed.head)))
        service.residency.release(lease)
    batches: list[list[Row]] = [[]]
    for row in rows:
        if sum(len(other.ids) for other in batches[-1]) + len(row.ids) > service.settings.batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def over_http(server: Server, inputs_per_call: int, in_flight: int, seconds: float) -> dict[str, float]:
    """Texts per second and latencies as a client in another process sees them."""
    command = [
        sys.executable,
        "-m",
        "tests.bench.load_client",
        *map(str, (server.port, inputs_per_call, in_flight, seconds)),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(server: Server, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Rounds of engine alone and each shape of calls, in turn."""
    alone: list[float] = []
    found: dict[tuple[int, int], list[dict[str, float]]] = {shape: [] for shape in SHAPES}
    engine_alone(server, 1.0)
    for _ in range(rounds):
        for shape in SHAPES:
            alone.append(engine_alone(server, seconds / 2))
            found[shape].append(over_http(server, *shape, seconds))
    base = statistics.median(alone)
    lines: list[dict[str, Any]] = [{"variant": "engine alone", "texts_per_s": round(base, 1), "ratio": 1.0}]
    for (inputs, in_flight), results in found.items():
        medians = {key: round(statistics.median(result[key] for result in results), 2) for key in results[0]}
        ratio = round(medians["texts_per_s"] / base, 3)
        lines.append({"variant": "http", "inputs_per_call": inputs, "in_flight": in_flight, **medians, "ratio": ratio})
    return lines


def show(lines: Sequence[dict[str, Any]]) -> None:
    """A table for people."""
    table = Table("", "inputs per call", "in flight", "texts/s", "p50 ms", "p99 ms", "of the engine alone")
    for line in lines:
        cells = [
            str(line.get(key, ""))
            for key in ("variant", "inputs_per_call", "in_flight", "texts_per_s", "p50_ms", "p99_ms")
        ]
        table.add_row(*cells, f"{line['ratio']:.2f}")
    Console(width=120).print(table)


def main() -> None:
    """Run, show, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the forward")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    sys.setswitchinterval(0.00002)  # as `python -m server` sets it
    with tempfile.TemporaryDirectory() as root:
        served = backbone.load(None, options.dtype, "cpu")
        make_store(Path(root), served)
        settings = Settings(store=Path(root), dtype=options.dtype, threads=options.threads)
        with Server(settings, served) as server:
            lines = measure(server, options.seconds, options.rounds)
    show(lines)
    print(write("end_to_end", [{"threads": options.threads, "dtype": options.dtype}, *lines]))


if __name__ == "__main__":
    main()
