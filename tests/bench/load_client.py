"""The load of end_to_end.py: a light process with plain sockets, so that it takes little of the machine.

Run by end_to_end.py: python -m tests.bench.load_client PORT INPUTS_PER_CALL IN_FLIGHT SECONDS
"""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

TASKS = [f"task{i:02d}" for i in range(16)]
DEMO_DATA = Path(__file__).parents[2] / "training" / "demo_data"


def texts() -> list[str]:
    """Short real texts of the demo's tasks."""
    files = sorted(DEMO_DATA.glob("*/train.jsonl"))
    return [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]


def calls(inputs_per_call: int, count: int = 64) -> list[dict[str, Any]]:
    """Bodies of calls: tasks in turn, other texts each time."""
    pool, at, bodies = texts(), 0, []
    for _ in range(count):
        inputs = [{"task": TASKS[(at + i) % 16], "text": pool[(at + i) % len(pool)]} for i in range(inputs_per_call)]
        bodies.append({"inputs": inputs})
        at += inputs_per_call
    return bodies


async def client(port: int, inputs_per_call: int, in_flight: int, seconds: float) -> dict[str, float]:
    """The load: so many connections, each sending its next call when the last one is answered."""
    bodies = [json.dumps(body).encode() for body in calls(inputs_per_call)]
    requests = [
        b"POST /v1/infer HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
        % (len(b), b)
        for b in bodies
    ]
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def one(index: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        while (start := time.perf_counter()) < end:
            index += 1
            writer.write(requests[index % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(
                next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")).split(b":")[1]
            )
            await reader.readexactly(length)
            latencies.append(time.perf_counter() - start)
        writer.close()

    begin = time.perf_counter()
    await asyncio.gather(*(one(7 * i) for i in range(in_flight)))
    took = time.perf_counter() - begin
    ordered = sorted(latencies)
    return {
        "texts_per_s": len(latencies) * inputs_per_call / took,
        "p50_ms": 1e3 * ordered[len(ordered) // 2],
        "p99_ms": 1e3 * ordered[int(len(ordered) * 0.99)],
    }


if __name__ == "__main__":
    port, inputs, in_flight, seconds = sys.argv[1:]
    print(json.dumps(asyncio.run(client(int(port), int(inputs), int(in_flight), float(seconds)))))
