"""The queue: bounded, batched by tokens, fair to neighbours, empty at the end."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import inference
from server.engine import Forwarded, Row
from server.errors import BatchFailedError, OverloadedError
from server.scheduler import Answer
from server.schemas import InferRequest
from server.service import Service
from tests.server.conftest import Serve
from tests.server.tools import (
    held_engine,
    live,
    metric,
    raw_post,
    running,
    sample,
    service_of,
    settings_for,
    until,
)


def body(*texts: str, task: str = "books", mode: str = "single") -> dict[str, Any]:
    return {"inputs": [{"task": task, "text": text} for text in texts], "options": {"mode": mode}}


def words(count: int) -> str:
    """A text of count tokens with the two special ones."""
    return " ".join(["good"] * (count - 2))


def plain(*lengths: int) -> list[Row]:
    return [Row([2, *[10] * (length - 2), 3], None, "mean", None) for length in lengths]


async def submit(service: Service, rows: Sequence[Row]) -> list[Answer]:
    with service.scheduler.admitted(sum(len(row.ids) for row in rows)) as admission:
        return await service.scheduler.submit(rows, admission)


def test_a_full_queue_answers_429_at_once_in_both_forms(serve: Serve) -> None:
    client = serve(queue_tokens=16)
    with ThreadPoolExecutor(2) as pool, held_engine(service_of(client)):
        running_one = pool.submit(client.post, "/v1/infer", json=body("good"))
        until(lambda: service_of(client).residency.num_held == 1)
        queued = pool.submit(client.post, "/v1/infer", json=body(words(12)))
        until(lambda: service_of(client).residency.num_held == 2)
        native = client.post("/v1/infer", json=body(words(12)))
        openai = client.post("/v1/embeddings", json={"model": "books", "input": words(12)})
    answered = [running_one.result(), queued.result()]

    assert (native.status_code, native.json()["code"]) == (429, "overloaded")
    assert int(native.headers["retry-after"]) >= 1
    assert (openai.status_code, openai.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(openai.headers["retry-after"]) >= 1
    assert [one.status_code for one in answered] == [200, 200]
    assert metric(client, "espalier_rejected_total") == 2
    assert client.post("/v1/infer", json=body(words(12))).status_code == 200


def test_what_waits_for_adapters_counts_as_waiting_too(backbone: Path, store_root: Path) -> None:
    one = InferRequest.model_validate(body(words(12), task="films"))

    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, slots=1, queue_tokens=30)) as service:
            held = await service.residency.lease([service.catalog.resolve("books")])
            calls = [asyncio.ensure_future(inference.infer(service, one, None)) for _ in range(5)]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            service.residency.release(held)
            results = await asyncio.gather(*calls, return_exceptions=True)

            assert [isinstance(result, OverloadedError) for result in results] == [False, False, True, True, True]

    asyncio.run(scenario())


def test_an_empty_queue_takes_a_call_that_is_larger_than_itself(serve: Serve) -> None:
    client = serve(queue_tokens=16, batch_tokens=16)

    response = client.post("/v1/infer", json=body(*[words(10)] * 8))

    assert response.status_code == 200
    assert len(response.json()["outputs"]) == 8


def test_no_forward_exceeds_the_token_budget_but_one_long_row_runs_alone(serve: Serve) -> None:
    client = serve(batch_tokens=32)
    lengths = [5, 9, 30, 31, 32, 40, 7, 7, 7, 7, 7]

    client.post("/v1/infer", json=body(*map(words, lengths)))

    forwards = metric(client, "espalier_batch_tokens_count")
    assert metric(client, "espalier_batch_tokens_bucket", le="32.0") == forwards - 1  # the row of 40
    assert metric(client, "espalier_batch_tokens_sum") == sum(lengths)
    assert metric(client, "espalier_rows_total") == len(lengths)


def batches_of(service: Service, lengths: Sequence[int]) -> list[list[int]]:
    """How rows of these lengths are batched when they queue together."""
    seen: list[list[int]] = []
    forward = service.engine.forward

    def watched(rows: Sequence[Row]) -> Forwarded:
        seen.append([len(row.ids) for row in rows])
        return forward(rows)

    service.engine.forward = watched  # type: ignore[method-assign]
    return seen


def test_rows_that_do_not_fit_let_later_ones_fill_the_batch(backbone: Path, store_root: Path) -> None:
    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, batch_tokens=40)) as service:
            assert service.backbone.encoder.is_packed
            seen = batches_of(service, [])

            await submit(service, plain(20, 30, 12, 8, 10, 30))

            assert seen == [[20, 12, 8], [30, 10], [30]]

    asyncio.run(scenario())


def test_a_padded_encoder_batches_rows_of_like_lengths(backbone: Path, store_root: Path) -> None:
    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, batch_tokens=64)) as service:
            encoder = service.backbone.encoder
            encoder.is_packed = False
            encoder.model.set_attn_implementation("eager")
            seen = batches_of(service, [])

            answers = await submit(service, plain(5, 30, 6, 29, 5, 30, 7, 6))

            assert seen == [[5, 5, 6, 6, 7], [30, 30], [29]]
            assert all(len(batch) * max(batch) <= 64 for batch in seen)
            assert answers[0].values == pytest.approx(answers[4].values, abs=1e-6)

    asyncio.run(scenario())


def test_rows_of_a_client_that_left_are_skipped_and_its_adapters_let_go(backbone: Path, store_root: Path) -> None:
    with live(settings_for(backbone, store_root)) as (url, service):
        with held_engine(service):
            blocker = raw_post(url, "/v1/infer", body("good"))
            until(lambda: service.residency.num_held == 1)
            leaving = raw_post(url, "/v1/infer", body("bad", "bad", "bad", task="films"))
            until(lambda: service.residency.num_held == 2)
            leaving.close()
            until(lambda: service.residency.num_held == 1, "the leaving client's lease")
        reply = httpx.post(f"{url}/v1/infer", json=body("good"))
        blocker.close()
        text = httpx.get(f"{url}/metrics").text

    assert reply.status_code == 200
    assert sample(text, "espalier_rows_skipped_total") >= 3
    assert sample(text, "espalier_requests_total", endpoint="/v1/infer", status="499") >= 1
    assert service.residency.num_held == 0


def test_a_client_that_leaves_logs_no_traceback(
    backbone: Path, store_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with live(settings_for(backbone, store_root)) as (url, service), held_engine(service):
        leaving = raw_post(url, "/v1/infer", body("good"))
        until(lambda: service.residency.num_held == 1)
        leaving.close()
        until(lambda: service.residency.num_held == 0)

    assert not [record for record in caplog.records if record.levelname == "ERROR" or record.exc_info]


def test_a_forward_that_fails_fails_its_own_rows_only(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    client = serve()
    service = service_of(client)
    forward = service.engine.forward

    def failing(rows: Sequence[Row]) -> Forwarded:
        service.engine.forward = forward  # type: ignore[method-assign]
        raise ValueError("".join(["sec", "ret"]))

    service.engine.forward = failing  # type: ignore[method-assign]
    failed = client.post("/v1/infer", json=body("good"))
    after = client.post("/v1/infer", json=body("good"))

    assert (failed.status_code, failed.json()["code"]) == (500, "forward_failed")
    assert after.status_code == 200
    assert service.residency.num_held == 0
    assert metric(client, "espalier_forward_failures_total") == 1
    assert "ValueError" in str([vars(record) for record in caplog.records])
    assert "secret" not in str([vars(record) for record in caplog.records])


def test_a_failed_batch_leaves_the_rows_behind_it_alone(backbone: Path, store_root: Path) -> None:
    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, batch_tokens=16)) as service:
            forward = service.engine.forward

            def failing(rows: Sequence[Row]) -> Forwarded:
                if len(rows[0].ids) == 13:
                    raise RuntimeError("out of memory")
                return forward(rows)

            service.engine.forward = failing  # type: ignore[method-assign]
            results = await asyncio.gather(*(submit(service, plain(n)) for n in (12, 13, 14)), return_exceptions=True)

            assert [isinstance(result, BatchFailedError) for result in results] == [False, True, False]

    asyncio.run(scenario())
