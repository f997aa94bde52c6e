"""Slots, leases and evictions, on a real service without HTTP."""

import asyncio
import contextlib
import weakref
from pathlib import Path

import pytest

from adapters_store.adapter import Adapter
from adapters_store.backbones import fingerprint
from adapters_store.errors import CorruptError, EspalierError, RefusedError
from adapters_store.manifest import GoldenExample, Manifest
from adapters_store.sites import num_filled
from adapters_store.store import AdapterStore
from server import inference
from server.errors import TooManyAdaptersError
from server.schemas import InferRequest
from server.service import Service
from tests.server.tiny import TASKS, head, lora, make_adapter
from tests.server.tools import held_engine, publish, running, settings_for, until_async

SITES = 4  # that each adapter of tiny.py touches


def versions(service: Service, *names: str) -> list[Manifest]:
    return [service.catalog.resolve(name) for name in names]


async def filled(service: Service) -> int:
    """(site, slot) pairs in use, once the engine has done what was posted."""
    return await service.engine.run(lambda: num_filled(service.backbone.encoder.sites))


def resident(service: Service) -> set[str]:
    manifests = [m for found in service.catalog.manifests.values() for m in found.values()]
    return {m.name for m in manifests if service.residency.state(m) == "device"}


def test_a_lease_is_had_all_or_nothing(backbone: Path, store_root: Path) -> None:
    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, slots=2, preload=False)) as service:
            books, films, spam = versions(service, *TASKS)
            first = await service.residency.lease([books])

            waiting = asyncio.ensure_future(service.residency.lease([films, spam]))
            await until_async(lambda: service.residency.waiting)

            assert service.residency.num_held == 1  # it took none of its two while one slot was free
            service.residency.release(first)
            service.residency.release(await waiting)
            assert resident(service) == {"films", "spam"}

    asyncio.run(scenario())


def test_what_is_held_is_never_evicted_and_the_oldest_idle_is(backbone: Path, store_root: Path) -> None:
    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, slots=2, preload=False)) as service:
            books, films, spam = versions(service, *TASKS)
            held = await service.residency.lease([books])
            for manifest in (films, spam, films):
                service.residency.release(await service.residency.lease([manifest]))
                assert "books" in resident(service)
            service.residency.release(held)
            service.residency.release(await service.residency.lease([spam]))

            assert resident(service) == {"films", "spam"}  # books was used least recently
            assert await filled(service) == 2 * SITES

    asyncio.run(scenario())


def test_versions_with_only_a_head_are_bounded_too_and_the_oldest_idle_one_goes(
    backbone: Path, store_root: Path
) -> None:
    store, facts = AdapterStore(store_root), {"kind": "head", "backbone": fingerprint(backbone, "float32")}
    names = [f"head{i}" for i in range(6)]
    for seed, name in enumerate(names):
        store.publish(Adapter([], head(seed)), name=name, task=name, **facts)

    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, slots=2, preload=False)) as service:
            held = await service.residency.lease(versions(service, "head0", "books"))
            for name in names[1:]:
                service.residency.release(await service.residency.lease(versions(service, name)))

            assert resident(service) == {"books", "head0", "head4", "head5"}  # what is held stays
            assert service.metrics.resident.labels("device")._value.get() == 4
            service.residency.release(held)
            service.residency.release(await service.residency.lease(versions(service, *names)))
            assert resident(service) == {"books", "head3", "head4", "head5"}  # one call may need more, for its time

    asyncio.run(scenario())


def test_calls_that_wait_proceed_in_the_order_of_asking(backbone: Path, store_root: Path) -> None:
    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, slots=1, preload=False)) as service:
            books, films, spam = versions(service, *TASKS)
            order: list[str] = []

            async def use(manifest: Manifest) -> None:
                lease = await service.residency.lease([manifest])
                order.append(manifest.name)
                service.residency.release(lease)

            held = await service.residency.lease([books])
            calls = []
            for manifest in (films, spam, films, books):
                calls.append(asyncio.ensure_future(use(manifest)))
                await asyncio.sleep(0)
            service.residency.release(held)
            await asyncio.gather(*calls)

            assert order == ["films", "spam", "films", "books"]

    asyncio.run(scenario())


@pytest.mark.parametrize("moment", ["waiting", "loading"])
def test_a_cancelled_lease_leaves_no_holder_and_blocks_nobody(backbone: Path, store_root: Path, moment: str) -> None:
    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, slots=1, preload=False)) as service:
            books, films, spam = versions(service, *TASKS)
            held = await service.residency.lease([books])
            if moment == "loading":
                service.residency.release(held)
            with held_engine(service):  # nothing can finish loading meanwhile
                cancelled = asyncio.ensure_future(service.residency.lease([films]))
                await asyncio.sleep(0)
                next_one = asyncio.ensure_future(service.residency.lease([spam]))
                await until_async(lambda: service.residency.waiting["spam"])
                cancelled.cancel()
                await asyncio.wait([cancelled])
            if moment == "waiting":
                service.residency.release(held)

            service.residency.release(await asyncio.wait_for(next_one, 30))

            assert service.residency.num_held == 0
            assert not service.residency.waiting
            assert await filled(service) == SITES

    asyncio.run(scenario())


def test_a_failed_load_frees_the_slot_and_tells_all_who_wait(backbone: Path, store_root: Path) -> None:
    damaged = AdapterStore(store_root).resolve("films").blob.removeprefix("sha256:")
    (store_root / "blobs" / "sha256" / damaged).write_bytes(b"junk")

    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, slots=1, preload=False)) as service:
            books, films, _ = versions(service, *TASKS)

            results = await asyncio.gather(
                *(service.residency.lease([films]) for _ in range(3)), return_exceptions=True
            )

            assert [type(result) for result in results] == [CorruptError] * 3
            assert service.residency.num_held == 0
            assert "films@1" in service.problems
            service.residency.release(await service.residency.lease([books]))
            assert await filled(service) == SITES

    asyncio.run(scenario())


@pytest.mark.parametrize("refusal", ["golden", "rank"])
def test_a_refused_adapter_is_remembered_without_its_tensors(backbone: Path, store_root: Path, refusal: str) -> None:
    wrong = [GoldenExample(text="good", logits=(40.0, -40.0))]
    publish(store_root, backbone, "liar", 72, golden=wrong if refusal == "golden" else [])
    seen: list[weakref.ref[Adapter]] = []

    class Watched(Service):
        def check(self, loaded: Adapter) -> None:
            seen.append(weakref.ref(loaded))
            super().check(loaded)

    async def scenario() -> None:
        service = Watched(settings_for(backbone, store_root, preload=False, max_rank=4 if refusal == "golden" else 3))
        await service.start()
        with contextlib.suppress(RefusedError):
            await service.residency.lease(versions(service, "liar"))

        assert list(service.problems) == ["liar@1"]
        await until_async(lambda: [ref() for ref in seen] == [None], "letting go of the adapter")
        await service.stop()

    asyncio.run(scenario())


def test_two_names_of_equal_content_share_a_slot(backbone: Path, store_root: Path) -> None:
    publish(store_root, backbone, "one", 70)
    publish(store_root, backbone, "two", 70)

    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, preload=False)) as service:
            one, two = versions(service, "one", "two")

            lease = await service.residency.lease([one])
            other = await service.residency.lease([two])

            assert one.digest == two.digest
            assert lease.slot(one) == other.slot(two)
            assert await filled(service) == SITES
            service.residency.release(lease)
            service.residency.release(other)
            assert [m.name for m in await service.residency.unload([two], 1)] == ["two"]
            assert await filled(service) == 0

    asyncio.run(scenario())


def test_unload_waits_for_the_holders_and_a_new_call_loads_anew(backbone: Path, store_root: Path) -> None:
    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, preload=False)) as service:
            (books,) = versions(service, "books")
            lease = await service.residency.lease([books])

            unloading = asyncio.ensure_future(service.residency.unload([books], 30))
            await asyncio.sleep(0)
            again = await service.residency.lease([books])

            assert not unloading.done()
            assert again.slot(books) != lease.slot(books)
            service.residency.release(lease)
            assert await unloading == [books]
            service.residency.release(again)
            assert await filled(service) == SITES
            assert await service.residency.unload([books], 0) == [books]
            assert await filled(service) == 0

    asyncio.run(scenario())


def test_unload_gives_up_after_its_time_and_says_so(backbone: Path, store_root: Path) -> None:
    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, preload=False)) as service:
            (books,) = versions(service, "books")
            lease = await service.residency.lease([books])

            assert await service.residency.unload([books], 0.01) == []
            service.residency.release(lease)
            assert await filled(service) == 0

    asyncio.run(scenario())


def test_more_adapters_than_slots_in_one_lease_are_refused(backbone: Path, store_root: Path) -> None:
    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, slots=2, preload=False)) as service:
            with pytest.raises(TooManyAdaptersError, match="2 slots"):
                await service.residency.lease(versions(service, *TASKS))

            assert service.residency.num_held == 0

    asyncio.run(scenario())


def test_evicted_and_reloaded_a_hundred_times_an_adapter_answers_the_same_bits(
    backbone: Path, store_root: Path
) -> None:
    asked = [
        InferRequest.model_validate({"inputs": [{"task": t, "text": "good"}], "options": {"mode": "single"}})
        for t in TASKS
    ]

    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, slots=1)) as service:
            first = [(await inference.infer(service, one, None))["outputs"] for one in asked]
            before = await filled(service)
            for turn in range(100):
                assert (await inference.infer(service, asked[turn % 3], None))["outputs"] == first[turn % 3]

            assert await filled(service) == before == SITES
            assert service.metrics.evictions._value.get() >= 100

    asyncio.run(scenario())


def test_a_small_adapter_leaves_nothing_of_the_large_one_it_displaces(backbone: Path, store_root: Path) -> None:
    store = AdapterStore(store_root)
    facts = {"kind": "lora", "backbone": fingerprint(backbone, "float32")}
    store.publish(make_adapter(50, modules=("query", "key", "value"), rank=9), name="large", task="large", **facts)
    store.publish(Adapter(lora(51)[:1], head(51)), name="small", task="small", **facts)
    body = InferRequest.model_validate({"inputs": [{"task": "small", "text": "good"}], "options": {"mode": "single"}})

    async def answer(*before: str) -> list:
        async with running(settings_for(backbone, store_root, slots=1, preload=False)) as service:
            for name in before:
                service.residency.release(await service.residency.lease(versions(service, name)))
            return (await inference.infer(service, body, None))["outputs"]

    assert asyncio.run(answer("large")) == asyncio.run(answer())


def test_sixteen_clients_over_one_slot_too_few_are_all_answered(backbone: Path, store_root: Path) -> None:
    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, slots=2, preload=False)) as service:
            served = dict.fromkeys(TASKS, 0)

            async def client(number: int) -> None:
                for turn in range(6):
                    task = TASKS[(number + turn) % 3]
                    body = {"inputs": [{"task": task, "text": f"word{turn} good"}], "options": {"mode": "single"}}
                    reply = await inference.infer(service, InferRequest.model_validate(body), None)
                    served[reply["outputs"][0]["task"]] += 1

            await asyncio.wait_for(asyncio.gather(*(client(number) for number in range(16))), 60)

            assert served == dict.fromkeys(TASKS, 32)
            assert service.residency.num_held == 0

    asyncio.run(scenario())


def test_a_deleted_version_is_still_answered_for_who_pinned_it(backbone: Path, store_root: Path) -> None:
    publish(store_root, backbone, "brief", 71)

    async def scenario() -> None:
        async with running(settings_for(backbone, store_root, preload=False)) as service:
            (brief,) = versions(service, "brief")
            service.store.delete("brief", 1)
            await service.refresh()

            with pytest.raises(EspalierError):
                service.catalog.resolve("brief")
            service.residency.release(await service.residency.lease([brief]))

    asyncio.run(scenario())
