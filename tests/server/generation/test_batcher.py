"""Scheduling: budgets, memory, preemption, cancelling, failures; what is reused, and what must not be."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.language import LanguageModel
from adapters_store.mixing import Mix
from adapters_store.primitives import Entry
from adapters_store.roles import select
from server.errors import BatchFailedError, NotFiniteAnswerError
from server.generation import native_attention
from server.generation.batcher import Batcher
from server.generation.pages import PAGE
from server.generation.plan import Plan
from server.generation.sampling import Sampling
from server.generation.sequence import TokenSequence
from tests.server.generation.decoding import decoder_of, finish, output, sequence
from tests.server.generation.families import causal

MODEL = LanguageModel(causal("llama"))
DECODER = decoder_of(MODEL, 256)
SALT = b"s" * 32


def batcher_of(pages: int | None = None, **changes: Any) -> Batcher:
    return Batcher(decoder_of(MODEL, pages) if pages else DECODER, **({"step_tokens": 64} | changes))


def alone(ids: list[int], count: int, **changes: Any) -> list[int]:
    batcher = batcher_of()
    one = sequence(ids, count, **changes)
    batcher.add(one)
    finish(batcher)
    return output(one)


@settings(max_examples=25)
@given(data=st.data())
def test_whatever_comes_and_goes_each_text_is_its_own_and_nothing_is_left(data: st.DataObject) -> None:
    pages = data.draw(st.integers(8, 30))
    batcher = batcher_of(pages, step_tokens=data.draw(st.integers(1, 40)), max_sequences=data.draw(st.integers(1, 6)))
    some = st.tuples(st.integers(0, 1), st.integers(1, 40), st.integers(1, 30))  # which text, tokens of it, new tokens
    drawn = data.draw(st.lists(some, min_size=1, max_size=8))
    asked = [([(7 * i + 11 * text) % 90 + 3 for i in range(n)], count) for text, n, count in drawn]
    sequences = [sequence(ids, count, salt=data.draw(st.sampled_from([None, SALT]))) for ids, count in asked]
    leaving = {data.draw(st.integers(1, 20)): one for one in data.draw(st.sets(st.sampled_from(sequences), max_size=3))}
    for one in sequences:
        batcher.add(one)

    def each_step(step: int) -> None:
        assert batcher.pool.num_held <= pages
        if step in leaving:
            batcher.cancel([leaving[step]])

    finish(batcher, each_step)

    assert batcher.pool.num_held == 0
    gone = list(leaving.values())
    for one, (ids, count) in zip(sequences, asked, strict=True):
        expected = alone(ids, count)
        assert output(one) == expected[: len(output(one))]
        assert one in gone or len(output(one)) == count


def test_no_step_exceeds_its_tokens_and_decoding_comes_first() -> None:
    batcher = batcher_of(step_tokens=16)
    seen: list[list[int]] = []
    forward = batcher.decoder.forward

    def watched(plan: Plan) -> torch.Tensor:
        seen.append([chunk.count for chunk in plan.chunks])
        return forward(plan)

    batcher.decoder.forward = watched  # type: ignore[method-assign]
    try:
        batcher.add(sequence([5] * 10, 6))
        batcher.step()
        batcher.add(sequence([6] * 40, 2))
        finish(batcher)
    finally:
        batcher.decoder.forward = forward  # type: ignore[method-assign]

    assert seen == [[10], [1, 15], [1, 15], [1, 10], [1, 1], [1]]


def test_end_tokens_end_and_the_context_is_a_limit() -> None:
    free = alone([5, 6, 7], 30)
    end = free[4]
    ended, full = sequence([5, 6, 7], 30, end_ids=frozenset({end})), sequence([5, 6, 7], 10_000)
    batcher = batcher_of()
    for one in (ended, full):
        batcher.add(one)

    reasons = {id(event.sequence): event.finish_reason for event in finish(batcher)}

    assert output(ended) == free[: free.index(end) + 1]
    assert (reasons[id(ended)], reasons[id(full)]) == ("stop", "length")
    assert len(full.ids) == batcher.decoder.max_length == 128


def test_memory_for_less_than_the_context_shortens_the_context() -> None:
    assert decoder_of(MODEL, 3).max_length == 3 * PAGE
    with pytest.raises(ValueError, match="too few"):
        decoder_of(MODEL, 0)


@pytest.mark.parametrize("pages", [2**50, 2**80])
def test_more_memory_than_there_is_is_refused_by_what_it_is_for(pages: int) -> None:
    with pytest.raises(ValueError, match=r"does not give .* KV memory"):
        decoder_of(MODEL, pages)


def test_seeded_texts_survive_preemption() -> None:
    wild = Sampling(temperature=1.3, seed=7, presence_penalty=0.4, repetition_penalty=1.1)
    asked = [[9 + i] * 20 for i in range(6)]
    expected = [alone(ids, 40, sampling=wild) for ids in asked]
    batcher = batcher_of(12)
    sequences = [sequence(ids, 40, sampling=wild) for ids in asked]
    for one in sequences:
        batcher.add(one)

    finish(batcher)

    assert batcher.counters.preemptions > 0
    assert [output(one) for one in sequences] == expected
    assert len({tuple(row) for row in expected}) == 6


def test_an_equal_prefix_under_an_equal_composition_is_reused() -> None:
    batcher = batcher_of()
    prompt = [(11 * i) % 90 + 3 for i in range(50)]
    first, second, longer = (sequence(ids, 5, salt=SALT) for ids in (prompt, prompt, [*prompt[:32], 9, 9]))
    for one in (first, second, longer):
        batcher.add(one)
        finish(batcher)

    assert (first.cached, second.cached, longer.cached) == (0, 48, 32)
    assert output(second) == output(first) == alone(prompt, 5)
    assert output(longer) == alone(longer.ids[:34], 5)
    assert batcher.counters.cached_tokens == 80


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    batcher = batcher_of()
    prompt = [(11 * i) % 90 + 3 for i in range(32)]
    sequences = [sequence(prompt, 5, salt=SALT) for _ in range(2)]
    for one in sequences:
        batcher.add(one)
        finish(batcher)

    assert [one.cached for one in sequences] == [0, 16]
    assert output(sequences[0]) == output(sequences[1])


def test_generated_text_is_reused_as_a_prompt() -> None:
    batcher = batcher_of()
    first = sequence([5, 6, 7], 40, salt=SALT)
    batcher.add(first)
    finish(batcher)
    second = sequence([*first.ids, 8], 5, salt=SALT)
    batcher.add(second)

    finish(batcher)

    assert second.cached == 32
    assert output(second) == alone([*first.ids, 8], 5)


def test_equal_prompts_of_one_step_are_computed_once() -> None:
    batcher = batcher_of()
    prompt = [(11 * i) % 90 + 3 for i in range(100)]  # two steps; 96 tokens fill pages
    wild = [Sampling(temperature=1.3, seed=seed) for seed in range(4)]
    sequences = [sequence(prompt, 8, sampling=one, salt=SALT) for one in wild]
    held = []
    for one in sequences:
        batcher.add(one)

    finish(batcher, lambda _: held.append((batcher.counters.tokens, batcher.pool.num_held)))

    assert [output(one) for one in sequences] == [alone(prompt, 8, sampling=one) for one in wild]
    assert held[:2] == [(64, 7), (100 + 3 * 4, 6 + 4)], "what does not fill a page is computed by each"
    assert batcher.counters.tokens == 100 + 3 * 4 + 4 * 7
    assert batcher.pool.num_held == 0


@pytest.mark.parametrize("length", [17, 33, 48])
def test_a_last_token_looks_at_pages_that_its_own_step_fills(length: int) -> None:
    batcher = batcher_of(step_tokens=256)
    prompt = [(11 * i) % 90 + 3 for i in range(length)]
    sequences = [sequence(prompt, 5, salt=SALT) for _ in range(3)]
    for one in sequences:
        batcher.add(one)
    batcher.step()

    assert batcher.counters.tokens == length + 2 * ((length - 1) % PAGE + 1)
    finish(batcher)
    assert [output(one) for one in sequences] == [alone(prompt, 5)] * 3


def test_what_a_failed_step_wrote_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = batcher_of(step_tokens=256)
    prompt = [(11 * i) % 90 + 3 for i in range(100)]
    for one in (sequence(prompt, 5, salt=SALT), sequence(prompt, 5, salt=SALT)):
        batcher.add(one)
    with monkeypatch.context() as patch:
        patch.setattr(batcher.decoder, "forward", lambda _: 1 / 0)
        batcher.step()
    again = sequence(prompt, 5, salt=SALT)
    batcher.add(again)

    finish(batcher)

    assert (again.cached, output(again)) == (0, alone(prompt, 5))
    assert batcher.pool.num_held == 0


@pytest.mark.parametrize("salt", [None, b"t" * 32])
def test_another_composition_reuses_nothing(salt: bytes | None) -> None:
    batcher = batcher_of()
    prompt = [(11 * i) % 90 + 3 for i in range(50)]
    for one in (sequence(prompt, 5, salt=SALT), other := sequence(prompt, 5, salt=salt)):
        batcher.add(one)
        finish(batcher)

    assert other.cached == 0


def broken_slot(slot: int, value: float) -> Mix:
    """A slot whose adapter gives this number times something."""
    entries = [
        Entry(name, "lowrank", {"A": torch.full((1, 32), value), "B": torch.ones(32, 1)})
        for name in select(MODEL.encoder.sites, ["o"])
    ]
    MODEL.encoder.sites.put(slot, entries)
    return Mix.one_hot(slot, MODEL.encoder.num_layers)


def test_numbers_that_overflow_end_their_own_text_only() -> None:
    mix = broken_slot(3, 3e38)
    batcher = batcher_of()
    bad, good = sequence([5, 6], 8, mix), sequence([5, 6], 8)
    for one in (bad, good):
        batcher.add(one)

    events = finish(batcher)
    MODEL.encoder.sites.drop(3)

    failed = [event for event in events if event.error]
    assert [event.sequence for event in failed] == [bad]
    assert isinstance(failed[0].error, NotFiniteAnswerError)
    assert output(good) == alone([5, 6], 8)
    assert batcher.pool.num_held == 0


OVERFLOWS = 50  # a token that the adapter below makes infinite; none other
PREFIX = [3 + 7 * i % 40 for i in range(32)]


@pytest.fixture(scope="module")
def explosive() -> tuple[LanguageModel, Mix]:
    """A model and a mix under which one token overflows in the first layer's values."""
    model = causal("llama")
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[:, 0] = 0
        table[OVERFLOWS, 0] = 1
    language = LanguageModel(model)
    tensors = {"A": torch.eye(32)[:1] * 3, "B": torch.full((16, 1), 3e38)}
    language.encoder.sites.put(0, [Entry("layers.0.self_attn.v_proj", "lowrank", tensors, {"scale": 1.0})])
    return language, Mix.one_hot(0, language.encoder.num_layers)


@pytest.mark.parametrize("is_at_once", [True, False])
@pytest.mark.parametrize("is_native", [True, False])
def test_a_prompt_that_overflows_spoils_no_other_that_begins_alike(
    explosive: tuple[LanguageModel, Mix], is_at_once: bool, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        monkeypatch.setattr(native_attention, "supports", lambda *_: False)
    language, mix = explosive
    batcher = Batcher(decoder_of(language, 64))
    wild = Sampling(temperature=1.0, seed=3)

    def asked(salt: bytes | None, *more: int) -> TokenSequence:
        return sequence([*PREFIX, *more], 4, mix, salt=salt, sampling=wild)

    alone, bad, good = asked(None, 60, 61), asked(SALT, OVERFLOWS), asked(SALT, 60, 61)
    for calls in [[alone], [bad, good]] if is_at_once else [[alone], [bad], [good]]:
        for one in calls:
            batcher.add(one)
        events = finish(batcher)
        assert [event.sequence for event in events if event.error] == [one for one in calls if one is bad]

    assert len(output(alone)) == 4
    assert output(good) == output(alone)
    assert good.cached == (32 if is_at_once else 0)
    assert batcher.pool.num_held == 0


def test_a_forward_that_fails_ends_its_own_texts_and_the_next_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = batcher_of(max_sequences=2)
    sequences = [sequence([5, i], 3) for i in range(3, 6)]
    for one in sequences:
        batcher.add(one)
    with monkeypatch.context() as patch:
        patch.setattr(batcher.decoder, "forward", lambda _: 1 / 0)
        events = batcher.step()

    assert [event.sequence for event in events] == sequences[:2]
    assert all(isinstance(event.error, BatchFailedError) for event in events)
    assert isinstance(events[0].error.__cause__, ZeroDivisionError)
    finish(batcher)
    assert output(sequences[2]) == alone([5, 5], 3)
    assert batcher.pool.num_held == 0
