"""Memory is bounded, and whatever happens to a call nothing of it stays."""

import asyncio
import random
from pathlib import Path

import pytest

from adapters_store.language import LanguageModel
from server.compose import Ask
from server.errors import BatchFailedError, OverloadedError
from server.generation.ask import generating
from server.generation.batcher import Batcher
from server.generation.generation import Stopping, Wanted
from server.generation.pages import PAGE
from server.generation.sampling import Sampling
from server.service import Service
from tests.server.generation.decoding import decoder_of, finish, output, sequence
from tests.server.generation.families import causal, greedy
from tests.server.generation.tiny_decoder import NAMES, make_decoder, make_store
from tests.server.tools import running, settings_for, until_async

CONTEXT = 128


def test_200_requests_up_to_the_context_in_memory_for_a_quarter_of_them_all_finish_right() -> None:
    asked = requests(200)
    needed = sum(-(-(len(ids) + count) // PAGE) for ids, count in asked)
    batcher = Batcher(decoder_of(LanguageModel(causal("llama")), needed // 4), step_tokens=256, max_sequences=200)
    sequences = [sequence(ids, count) for ids, count in asked]
    for one in sequences:
        batcher.add(one)
    memory = [part for layer in batcher.decoder.memory.layers.values() for part in layer]
    num_bytes = sum(part.nbytes for part in memory)

    pages, running = [], []
    finish(batcher, lambda _: (pages.append(batcher.pool.num_held), running.append(len(batcher.running))))

    model = causal("llama")
    assert all(output(one) == greedy(model, ids, count) for one, (ids, count) in zip(sequences, asked, strict=True))
    assert max(pages) <= needed // 4
    assert 20 < max(running) < 150, "some waited"
    assert sum(part.nbytes for part in memory) == num_bytes
    assert num_bytes == (needed // 4 + 1) * batcher.decoder.memory.page_bytes, "and the idle page"
    assert batcher.pool.num_held == 0


def requests(count: int) -> list[tuple[list[int], int]]:
    """Prompts and numbers of new tokens, together up to the context."""
    rng = random.Random(0)
    lengths = [rng.randrange(2, CONTEXT) for _ in range(count)]
    prompts = [[(5 * k + 7 * i) % 90 + 3 for k in range(n)] for i, n in enumerate(lengths)]
    return [(prompt, rng.randrange(1, CONTEXT - len(prompt) + 1)) for prompt in prompts]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("tiny") / "tiny-llama")


def wanted(service: Service, i: int) -> Wanted:
    """A prompt under the prior composition of one of the tasks; now and then several choices."""
    composed = service.composer.compose(Ask("prior", NAMES[i % 16], needs_head=False), service.catalog)
    ids = [(5 * k + 7 * i) % 90 + 3 for k in range(1 + i % 40)]
    sampling = Sampling(temperature=i % 2, seed=i, logprobs=2 if i % 5 == 0 else None)
    return Wanted(ids, composed, sampling, Stopping(1 + i % 30, ("t11",) if i % 3 == 0 else ()), 1 + i % 3)


async def stay(service: Service, i: int) -> None:
    """Read to the end."""
    one = wanted(service, i)
    async with generating(service, [one]) as generation:
        reasons = [delta.finish_reason async for delta in generation if delta.finish_reason]
    assert len(reasons) == one.n


async def leave(service: Service, i: int) -> None:
    """Read some, then go: by leaving the block, by an error in it, or by being cancelled."""
    async with generating(service, [wanted(service, i)]) as generation:
        for _ in range(i % 4):
            if await anext(generation, None) is None:
                return
        if i % 3 == 0:
            raise ConnectionResetError
        if i % 3 == 1:
            await asyncio.Event().wait()


def held(service: Service) -> int:
    assert service.generator is not None
    batcher = service.generator.batcher
    return (
        service.generator.num_active + service.generator.waiting_tokens + service.residency.num_held
        + batcher.pool.num_held + len(batcher.running) + len(batcher.waiting)
    )  # fmt: skip


def test_after_1000_calls_of_which_half_left_early_nothing_is_held(decoder: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", decoder)
    settings = settings_for(decoder, store, kv_mb=1, slots=16, max_sequences=64, prefix_cache=True, queue_tokens=10**6)

    async def thousand() -> None:
        async with running(settings) as service:
            staying = [asyncio.create_task(stay(service, i)) for i in range(0, 1000, 2)]
            leaving = [asyncio.create_task(leave(service, i)) for i in range(1, 1000, 2)]
            await asyncio.gather(*staying)
            for task in leaving:
                task.cancel()
            ends = await asyncio.gather(*leaving, return_exceptions=True)
            assert {type(end) for end in ends} <= {type(None), ConnectionResetError, asyncio.CancelledError}
            assert sum(isinstance(end, asyncio.CancelledError) for end in ends) > 100
            await until_async(lambda: not held(service), "nothing held")
            sites = service.backbone.encoder.sites
            assert sites.batch is None
            again = wanted(service, 7)
            async with generating(service, [again]) as generation:
                assert [delta async for delta in generation]

    asyncio.run(thousand())


def test_a_full_queue_refuses_at_once_and_keeps_what_it_has(decoder: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", decoder)
    settings = settings_for(decoder, store, kv_mb=1, queue_tokens=60)

    async def crowded() -> None:
        async with running(settings) as service:
            tasks = [asyncio.create_task(stay(service, 39)) for _ in range(5)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            refused = [one for one in results if isinstance(one, OverloadedError)]
            assert refused
            assert refused[0].retry_after_s >= 1
            assert None in results
            await until_async(lambda: not held(service), "nothing held")

    asyncio.run(crowded())


def test_stopping_the_server_finishes_what_was_admitted(decoder: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", decoder)

    async def stopped() -> None:
        async with running(settings_for(decoder, store, kv_mb=1)) as service:
            tasks = [asyncio.create_task(stay(service, i)) for i in range(20)]
            await until_async(lambda: service.generator and service.generator.num_active == 20, "all admitted")
        await asyncio.gather(*tasks)

    asyncio.run(stopped())


def test_an_error_of_scheduling_ends_every_request_and_the_next_is_answered(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store", decoder)

    async def failing() -> None:
        async with running(settings_for(decoder, store, kv_mb=1)) as service:
            assert service.generator is not None
            with monkeypatch.context() as patch:
                patch.setattr(service.generator.batcher, "_schedule", lambda: 1 / 0)
                ends = await asyncio.gather(*(stay(service, i) for i in range(5)), return_exceptions=True)
            assert {type(end) for end in ends} == {BatchFailedError}
            await until_async(lambda: not held(service), "nothing held")
            await stay(service, 1)

    asyncio.run(failing())
