"""Stopping: what was admitted is answered, nothing new is, and the process ends in time."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from server import inference
from server.errors import DrainingError
from server.schemas import InferRequest
from tests.server.test_scheduler import body, plain, submit, words
from tests.server.tools import (
    Process,
    held_engine,
    raw_post,
    read_all,
    running,
    sample,
    settings_for,
    until,
    until_async,
)


def test_what_was_admitted_before_draining_is_answered_and_nothing_after(backbone: Path, store_root: Path) -> None:
    one = InferRequest.model_validate(body("good", "bad", task="films"))

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            service = await stack.enter_async_context(running(settings_for(backbone, store_root, preload=False)))
            with held_engine(service):
                flying = asyncio.ensure_future(inference.infer(service, one, None))  # still waits for its adapter
                await until_async(lambda: service.residency.num_held)
                draining = asyncio.ensure_future(service.scheduler.drain(30))
                await asyncio.sleep(0)
                with pytest.raises(DrainingError):
                    await inference.infer(service, one, None)
                assert not draining.done()

            assert await draining
            assert len((await flying)["outputs"]) == 2

    asyncio.run(scenario())


def test_a_drain_gives_up_after_its_time(backbone: Path, store_root: Path) -> None:
    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, drain_s=0)) as service:
            with held_engine(service):
                waiting = asyncio.ensure_future(submit(service, plain(5)))
                await until_async(lambda: not service.scheduler._idle.is_set())

                assert not await service.scheduler.drain(0.01)
            await waiting

    asyncio.run(scenario())


def test_sigterm_answers_what_is_in_flight_and_exits_with_zero(backbone: Path, store_root: Path) -> None:
    secret = "bad word7"
    many = body(*[f"{secret} {words(40)}"] * 400, mode="prior")
    with Process(backbone, store_root, "--batch-tokens", "64", "--drain-s", "30") as process:
        status = httpx.get(f"{process.url}/ready")
        with ThreadPoolExecutor(1) as pool:
            done = threading.Event()
            flying = pool.submit(raw_post, process.url, "/v1/infer", many).result()
            until(lambda: sample(httpx.get(f"{process.url}/metrics").text, "espalier_forwards_total") > 0)
            process.terminate()
            seen = []
            until(lambda: not _still_listens(process.url, seen) or done.is_set())
            answer = read_all(flying)
        code = process.wait()

    assert status.json()["ready"]
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.count(b'"label"') == 400
    assert code == 0
    assert set(seen) <= {200, 503}
    assert next(event for event in process.events if event["event"] == "drained")["finished"] is True
    assert secret not in "".join(process.lines)
    assert not [event for event in process.events if event["level"] == "ERROR"]


def _still_listens(url: str, seen: list[int]) -> bool:
    try:
        seen.append(httpx.get(f"{url}/ready").status_code)
    except httpx.TransportError:
        return False
    return True
