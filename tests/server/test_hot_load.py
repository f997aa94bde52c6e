"""Loading, promoting, rolling back, deleting and unloading while requests are in flight (peers.md, T1, T2, T10-T14)."""

import asyncio
import itertools
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store import exchange
from adapters_store.store import AdapterStore
from server.app import make_app
from server.service import Service
from tests.server.tiny import make_store, peft_files
from tests.server.tools import Process, held_engine, live, publish, raw_post, settings_for, until, until_async
from tests.server.traffic import PLAIN_TASKS, TEXTS, Admin, Traffic


def single(task: str, text: str = TEXTS[0]) -> dict[str, Any]:
    return {"inputs": [{"task": task, "text": text}], "options": {"mode": "single"}}


def our_files(folder: Path, backbone: Path, seed: int) -> dict[str, bytes]:
    """An upload in our own format."""
    manifest = publish(folder / "store", backbone, "x", seed)
    exchange.write_folder(folder / "out", manifest, AdapterStore(folder / "store").load(manifest))
    return {file.name: file.read_bytes() for file in (folder / "out").iterdir()}


async def _filled(service: Service) -> set[int]:
    sites = service.backbone.encoder.sites
    banks = [bank for site in sites.values() for bank in site.banks.values()]
    return await service.engine.run(lambda: {slot for bank in banks for slot in bank.slots})


def churn(admin: Admin, traffic: Traffic, uploads: list[dict[str, bytes]]) -> None:
    """Twenty uploads, and between them everything else that an operator does."""
    kept = 1
    for number, files in enumerate(uploads):
        if number % 2:
            admin.upload(f"hot{number}", files)
            traffic.tasks.append(f"hot{number}")
            admin.change("POST", f"/v1/adapters/hot{number}/unload")
            continue
        version = int(admin.upload("books", files).split("@")[1])
        admin.change("PUT", "/v1/adapters/books/aliases/prod", version=version)
        admin.change("POST", "/v1/adapters/films/unload")
        admin.change("PUT", "/v1/adapters/books/aliases/prod", version=kept)
        admin.change("POST", "/v1/adapters/books/load", version=version)
        if number % 4 == 0:
            kept = version
        else:
            admin.change("DELETE", f"/v1/adapters/books/versions/{version}")
            admin.gone.add(f"books@{version}")


def check(admin: Admin, traffic: Traffic) -> dict[str, int]:
    """Every answer is the answer of the very versions it names. Gives how many of each mode were compared."""
    compared = {"single": 0, "prior": 0}
    known: dict[Any, dict[str, float]] = {}
    for text, output in traffic.answers:
        composition = output["composition"]
        parts = {f"{one['name']}@{one['version']}": one["weights_by_layer"] for one in composition["adapters"]}
        if composition["mode"] == "single":
            expected = admin.alone[composition["adapters"][0]["digest"], text]
        elif admin.gone & set(parts):
            continue  # it can be asked for no more; what it answers alone is compared above
        else:
            head = next(reference for reference in parts if reference.startswith(output["task"] + "@"))
            key = (text, head, str(parts))
            known[key] = known.get(key) or admin.ask(parts, head, text)["scores"]
            expected = known[key]
        assert output["scores"] == pytest.approx(expected, abs=1e-4), output
        compared[composition["mode"]] += 1
    return compared


def test_twenty_uploads_under_eight_clients_fail_nobody_and_confuse_nothing(
    backbone: Path, store_root: Path, tmp_path: Path
) -> None:
    uploads = [
        our_files(tmp_path / str(i), backbone, 100 + i) if i % 4 < 2 else peft_files(100 + i, rank=2 + i % 5)
        for i in range(20)
    ]
    with Process(backbone, store_root, "--slots", "8", "--poll-s", "1", "--batch-tokens", "256") as process:
        with closing(Admin(process.url)) as admin:
            for task in PLAIN_TASKS:
                admin.learn(f"{task}@1")
            with closing(Traffic(process.url)) as traffic:
                until(lambda: len(traffic.answers) > 16)
                churn(admin, traffic, uploads)
            compared = check(admin, traffic)
        process.terminate()
        assert process.wait() == 0

    assert traffic.failures == []
    assert min(compared.values()) > 20
    assert len({output["composition"]["adapters"][0]["digest"] for _, output in traffic.answers}) > 8
    assert max(admin.first_answers_s) / len(TEXTS) < 1.0  # each of the calls
    assert not [event for event in process.events if event["level"] in ("ERROR", "WARNING")]
    assert not any(text in line for line in process.lines for text in TEXTS)


def test_what_is_in_flight_stays_on_its_version_through_promotion_rollback_and_unload(
    backbone: Path, store_root: Path
) -> None:
    publish(store_root, backbone, "books", 60)

    def version_of(reply: httpx.Response) -> int:
        return int(reply.json()["outputs"][0]["composition"]["adapters"][0]["version"])

    async def scenario() -> None:
        service = Service(settings_for(backbone, store_root))
        app = make_app(service)
        async with app.router.lifespan_context(app), _client(app) as client:
            alone = {n: (await client.post("/v1/infer", json=_explicit(f"books@{n}"))).json() for n in (1, 2)}
            with held_engine(service):
                flying = []
                for version in (2, 1, 2):
                    flying.append(asyncio.ensure_future(client.post("/v1/infer", json=single("books"))))
                    await until_async(lambda: service.residency.num_held == len(flying))
                    await client.put("/v1/adapters/books/aliases/prod", json={"version": version})
                unloading = asyncio.ensure_future(client.post("/v1/adapters/books/unload"))
            replies = await asyncio.gather(*flying)

            assert [version_of(reply) for reply in replies] == [1, 2, 1]
            for reply in replies:
                expected = alone[version_of(reply)]["outputs"][0]["scores"]
                assert reply.json()["outputs"][0]["scores"] == pytest.approx(expected, abs=2e-6)
            assert (await unloading).json()["unloaded"] == [1, 2]
            assert version_of(await client.post("/v1/infer", json=single("books"))) == 2
            assert service.residency.num_held == 0

    asyncio.run(scenario())


def _client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60)


def _explicit(reference: str) -> dict[str, Any]:
    return {"inputs": [{"adapters": {reference: 1.0}, "head": reference, "text": TEXTS[0]}]}


def test_sixty_four_changes_of_one_name_at_once_are_linear(backbone: Path, store_root: Path) -> None:
    publish(store_root, backbone, "books", 60)
    changes = [("POST", "load", None), ("POST", "unload", None), ("PUT", "aliases/prod", {"version": 1}),
               ("PUT", "aliases/prod", {"version": 2})]  # fmt: skip

    async def scenario() -> None:
        service = Service(settings_for(backbone, store_root, slots=2))
        app = make_app(service)
        async with app.router.lifespan_context(app), _client(app) as client:
            turns = itertools.islice(itertools.cycle(changes), 64)
            admin = [client.request(method, f"/v1/adapters/books/{path}", json=body) for method, path, body in turns]
            traffic = [client.post("/v1/infer", json=single(PLAIN_TASKS[i % 3])) for i in range(64)]
            replies = await asyncio.gather(*admin, *traffic)

            assert [reply.text for reply in replies if reply.status_code != 200] == []
            assert service.residency.num_held == 0
            records = service.store.alias_history("books", "prod")
            assert len(records) == 1 + 32
            await service.refresh()
            assert service.catalog.aliases["books"]["prod"] == records[-1].version
            await _assert_clean(service)

    asyncio.run(scenario())


async def _assert_clean(service: Service) -> None:
    residents = {r.slot for r in service.residency._residents.values() if r.slot is not None}
    assert await _filled(service) == residents
    assert len(residents) + len(service.residency._free) == service.settings.slots


def test_a_hundred_loads_and_unloads_leave_nothing_behind(backbone: Path, store_root: Path) -> None:
    async def scenario() -> None:
        service = Service(settings_for(backbone, store_root))
        app = make_app(service)
        async with app.router.lifespan_context(app), _client(app) as client:
            expected = (await client.post("/v1/infer", json=single("books"))).json()["outputs"]
            before = (await _filled(service), _open_files(), threading.active_count())
            for _ in range(100):
                assert (await client.post("/v1/adapters/books/unload")).json()["unloaded"] == [1]
                assert (await client.post("/v1/adapters/books/load")).json()["state"] == "device"

            assert (await client.post("/v1/infer", json=single("books"))).json()["outputs"] == expected
            assert (await _filled(service), _open_files(), threading.active_count()) == before
            assert service.residency.num_held == 0
            await _assert_clean(service)

    asyncio.run(scenario())


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_clients_that_leave_at_any_moment_leave_clean_answers_and_no_leases(backbone: Path, store_root: Path) -> None:
    chance = random.Random(5)
    with live(settings_for(backbone, store_root, slots=2, batch_tokens=64)) as (url, service):
        with httpx.Client(base_url=url) as client:
            expected = {
                task: client.post("/v1/infer", json=single(task)).json()["outputs"][0]["scores"] for task in PLAIN_TASKS
            }
            for turn in range(60):
                leaving = raw_post(url, "/v1/infer", single(PLAIN_TASKS[turn % 3], TEXTS[turn % 3] * 3))
                if chance.random() < 0.5:
                    leaving.recv(1)
                leaving.close()
                task = PLAIN_TASKS[(turn + 1) % 3]
                output = client.post("/v1/infer", json=single(task)).json()["outputs"][0]
                assert output["scores"] == pytest.approx(expected[task], abs=2e-6)
        until(lambda: service.residency.num_held == 0, "the last lease's end")
        assert not service.residency.waiting
        assert asyncio.run(_filled(service)) == {r.slot for r in service.residency._residents.values()}


def test_an_alias_that_moves_while_the_store_is_read_never_points_at_nothing(backbone: Path, tmp_path: Path) -> None:
    from server import catalog
    from server.catalog import Catalog

    make_store(tmp_path / "store", backbone)
    store = AdapterStore(tmp_path / "store")
    stop = threading.Event()

    def publisher() -> None:
        for seed in range(12):
            publish(tmp_path / "store", backbone, "books", seed, alias="prod")
            if seed:
                store.delete("books", seed + 1)
        stop.set()

    with ThreadPoolExecutor(1) as pool:
        publishing = pool.submit(publisher)
        seen = Catalog()
        while not stop.is_set() and not publishing.done():
            seen = catalog.read(store, seen, 2)
            assert seen.resolve("books@prod").name == "books"
            assert "books" in seen.tasks
        publishing.result()
