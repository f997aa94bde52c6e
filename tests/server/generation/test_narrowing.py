"""The last block past its keys and values runs for the tokens that choose only, and gives what the whole one gives."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from adapters_store.language import LanguageModel
from adapters_store.mixing import Mix
from server.generation import narrowing
from server.generation.batcher import Batcher
from server.generation.decoder import Decoder
from server.generation.narrowing import last_block
from server.generation.pages import PagePool, pages_for
from server.generation.plan import Chunk, Plan
from server.generation.sequence import TokenSequence
from tests.server.generation.decoding import decoder_of, finish, output, sequence
from tests.server.generation.families import PACKED, causal, greedy
from tests.server.generation.tiny_decoder import KINDS, adapter

PROMPTS = [[(5 * i + 7 * n) % 90 + 3 for i in range(length)] for n, length in enumerate((40, 1, 17, 33))]


@contextmanager
def tokens_in(module: nn.Module) -> Iterator[list[int]]:
    """How many tokens each forward of a module gave."""
    seen: list[int] = []
    handle = module.register_forward_hook(lambda *call: seen.append(call[-1].shape[-2]))
    yield seen
    handle.remove()


def planned(decoder: Decoder, mixes: list[Mix | None], rng: random.Random) -> Iterator[Plan]:
    """Steps that compute the prompts in random chunks."""
    pool = PagePool(decoder.memory.num_pages)
    sequences: list[TokenSequence] = []
    for ids, mix in zip(PROMPTS, mixes, strict=True):
        sequences.append(one := sequence(ids, 1, mix))
        one.pages = pool.take(pages_for(len(ids))) or []
    while left := [one for one in sequences if one.computed < len(one.ids)]:
        chunks = [Chunk(one, one.computed, rng.randint(1, len(one.ids) - one.computed)) for one in left]
        yield Plan(chunks, decoder.encoder.device)
        for chunk in chunks:
            chunk.sequence.computed = chunk.end


def logits(decoder: Decoder, mixes: list[Mix | None], seed: int) -> Tensor:
    found = [decoder.forward(plan) for plan in planned(decoder, mixes, random.Random(seed))]
    return torch.cat([part for part in found if len(part)])


@pytest.mark.parametrize("family", PACKED)
def test_it_gives_what_the_whole_block_gives(family: str) -> None:
    narrow, whole = (decoder_of(LanguageModel(causal(family))) for _ in range(2))
    assert narrow.is_narrowed == (family != "gpt2"), "GPT-2 gives its states the shape of its input at the end"
    whole._last_block = None

    for seed in range(5):
        torch.testing.assert_close(logits(narrow, [None] * 4, seed), logits(whole, [None] * 4, seed))


def test_so_it_does_under_adapters_of_every_kind() -> None:
    decoders = []
    for _ in range(2):
        language = LanguageModel(causal("llama"))
        for slot, kind in enumerate(KINDS):
            entries = adapter(kind, slot + 1)
            language.encoder.sites.check(entries)
            language.encoder.sites.put(slot, entries)
        decoders.append(decoder_of(language))
    narrow, whole = decoders
    whole._last_block = None
    mixes = [Mix.one_hot(2, 2), None, Mix((1, 5), torch.rand(2, 2).numpy()), Mix.one_hot(5, 2)]

    for seed in range(5):
        torch.testing.assert_close(logits(narrow, mixes, seed), logits(whole, mixes, seed))
    assert (logits(narrow, mixes, 0) - logits(narrow, [None] * 4, 0)).abs().max() > 0.1


def test_only_the_choosing_tokens_reach_the_end_of_the_model() -> None:
    decoder = decoder_of(LanguageModel(causal("llama")))
    block = last_block(decoder.encoder)
    assert block is not None
    batcher = Batcher(decoder, step_tokens=60)
    sequences = [sequence(prompt, 3) for prompt in PROMPTS]
    for one in sequences:
        batcher.add(one)

    with tokens_in(block.get_submodule("mlp")) as seen:
        finish(batcher)

    # 40 + 1 + 17, and 2 of the 33; its other 31 beside three that decode; then what is left to choose
    assert seen == [3, 4, 4, 1]
    assert [output(one) for one in sequences] == [greedy(causal("llama"), prompt, 3) for prompt in PROMPTS]
    assert "forward" not in vars(block), "between steps the block is as it was"


def test_a_chunk_that_ends_nothing_gives_no_logits() -> None:
    decoder = decoder_of(LanguageModel(causal("llama")))
    one = sequence(PROMPTS[0], 1)
    one.pages = [3, 4, 5]

    assert len(decoder.forward(Plan([Chunk(one, 0, 25)], decoder.encoder.device))) == 0
    one.computed = 25
    assert len(decoder.forward(Plan([Chunk(one, 25, 15)], decoder.encoder.device))) == 1


def test_a_block_that_cannot_be_narrowed_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrowing, "_narrowed", lambda value, *_: value)
    decoder = decoder_of(LanguageModel(causal("llama")))
    assert not decoder.is_narrowed
    monkeypatch.undo()
    batcher = Batcher(decoder)
    batcher.add(one := sequence(PROMPTS[0], 5))

    finish(batcher)

    assert output(one) == greedy(causal("llama"), PROMPTS[0], 5)


def test_a_backbone_without_a_list_of_layers_has_no_last_block() -> None:
    language = LanguageModel(causal("llama"))
    language.encoder.num_layers = 7

    assert last_block(language.encoder) is None
