"""What /metrics says: names by Prometheus' rules, bounded labels, counts that are true."""

import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from adapters_store import linear
from server.metrics import MAX_LABELS, Metrics
from tests.server.conftest import Serve
from tests.server.tools import held_engine, metric, service_of, until

UNITS = ("seconds", "bytes", "tokens", "rows", "adapters", "compositions", "requests", "info", "version")
NOT_BASE = re.compile(r"_(ms|us|ns|milliseconds|minutes|hours|kb|mb|gb|kib|mib|percent|celsius)(_|$)")


def families(client: TestClient) -> list[Any]:
    return list(text_string_to_metric_families(client.get("/metrics").text))


def ask(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/infer", json={"inputs": [{"task": "books", "text": "good"}]} | body)


def test_names_follow_the_rules_that_promtool_checks(client: TestClient) -> None:
    ask(client)

    for family in families(client):
        names = {sample.name for sample in family.samples}
        assert family.name.startswith("espalier_"), family.name
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name), family.name
        assert not NOT_BASE.search(family.name), family.name
        assert family.documentation, family.name
        assert not family.name.endswith(("_count", "_sum", "_bucket", "_total")) or family.type == "counter"
        if family.type == "counter":
            assert all(name.endswith(("_total", "_created")) for name in names), names
        else:
            assert not any(name.endswith("_total") for name in names), names
        if family.type == "histogram":
            assert family.name.endswith(UNITS), family.name


def test_every_label_is_bounded(client: TestClient) -> None:
    for number in range(30):
        client.get(f"/v1/adapters/name-{number}")
        client.get(f"/nowhere/{number}")
        client.get(f"/v1/tasks/name-{number}")

    endpoints = {s.labels["endpoint"] for f in families(client) for s in f.samples if "endpoint" in s.labels}

    assert endpoints <= {"/v1/adapters/{name}", "/v1/tasks/{task}", "/metrics", "unknown"}


def test_adapters_beyond_the_bound_count_as_other() -> None:
    metrics = Metrics()

    labels = {metrics.adapter_label(f"a{i}") for i in range(MAX_LABELS + 50)}

    assert len(labels) == MAX_LABELS + 1
    assert metrics.adapter_label("a0") == "a0"
    assert metrics.adapter_label("new") == "other"


def test_counts_are_what_happened(serve: Serve) -> None:
    client = serve(preload=False)

    ask(client)
    ask(client, inputs=[{"tasks": ["books", "films"], "text": "a"}], options={"mode": "single"})
    ask(client, inputs=[])

    assert metric(client, "espalier_requests_total", endpoint="/v1/infer", status="200") == 2
    assert metric(client, "espalier_requests_total", endpoint="/v1/infer", status="422") == 1
    assert metric(client, "espalier_request_seconds_count", endpoint="/v1/infer") == 3
    assert metric(client, "espalier_rows_total") == 3
    assert metric(client, "espalier_forwards_total") == metric(client, "espalier_batch_rows_count") == 2
    assert metric(client, "espalier_adapter_rows_total", adapter="books") == 2
    assert metric(client, "espalier_adapter_rows_total", adapter="films") == 2
    assert metric(client, "espalier_loads_total") == metric(client, "espalier_load_seconds_count") == 2
    assert metric(client, "espalier_resident_adapters", tier="device") == 2
    assert metric(client, "espalier_resident_adapters", tier="host") == 2
    assert metric(client, "espalier_graph_version") == 1
    assert metric(client, "espalier_queue_tokens") == metric(client, "espalier_queue_rows") == 0


def test_unloading_shows_in_the_residency_gauges(client: TestClient) -> None:
    client.post("/v1/adapters/books/unload")

    assert metric(client, "espalier_resident_adapters", tier="device") == 2
    assert metric(client, "espalier_resident_adapters", tier="host") == 2


def test_the_gateways_gauge_names_running_and_waiting_adapters(serve: Serve) -> None:
    from concurrent.futures import ThreadPoolExecutor

    client = serve(slots=1, preload=False)

    def labels() -> dict[str, str]:
        info = next(f for f in families(client) if f.name == "espalier_lora_requests_info")
        return dict(info.samples[0].labels)

    def single(task: str) -> Any:
        return ask(client, inputs=[{"task": task, "text": "a"}], options={"mode": "single"})

    idle = labels()
    with ThreadPoolExecutor(2) as pool, held_engine(service_of(client)):
        first = pool.submit(single, "books")
        until(lambda: labels()["running_lora_adapters"] == "books")
        second = pool.submit(single, "films")
        until(lambda: labels()["waiting_lora_adapters"] == "films")
    assert [first.result().status_code, second.result().status_code] == [200, 200]

    assert idle == {"max_lora": "1", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert labels() == idle


def test_each_app_counts_for_itself(serve: Serve) -> None:
    one, other = serve(), serve()

    ask(one)

    assert metric(one, "espalier_rows_total") == 1
    assert metric(other, "espalier_rows_total") == 0


def test_ready_says_what_multiplies_the_backbone(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tests' layers are too small to be laid out; a laid-out one names the kernel, or why there is none."""
    assert client.get("/ready").json()["linear_path"].startswith("torch")

    monkeypatch.setattr(service_of(client).backbone.encoder, "is_laid_out", True)

    assert client.get("/ready").json()["linear_path"] == linear.status().detail
