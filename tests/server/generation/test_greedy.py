"""Greedy texts from a screened head are those of all logits, in any company; what needs all logits gets them."""

from collections.abc import Sequence

import pytest
import torch

from adapters_store.language import LanguageModel
from adapters_store.mixing import Mix
from adapters_store.primitives import Entry
from server.errors import NotFiniteAnswerError
from server.generation.batcher import Batcher
from server.generation.sampling import Draw, Sampling
from server.generation.sequence import TokenSequence
from server.generation.taped import TapedDecode
from tests.adapters_store.native_linear import needs_screen
from tests.server.generation.decoding import GREEDY, decoder_of, finish, output
from tests.server.generation.families import causal

VOCABULARY = 4200
PROMPTS = [[(7 * i + 13 * n) % 4000 + 3 for i in range(3 + 9 * n)] for n in range(6)]
SIZES = {
    "hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def language() -> LanguageModel:
    """A Llama, laid out, with adapters in three slots, of which the last one overflows."""
    found = LanguageModel(causal("llama", **SIZES))
    found.lay_out()
    generator = torch.Generator().manual_seed(0)
    for slot, size in enumerate((1.0, 0.5, 3e38)):
        A, B = torch.randn(4, 256, generator=generator), torch.randn(256, 4, generator=generator)
        found.encoder.sites.put(
            slot, [Entry(f"layers.{layer}.self_attn.o_proj", "lowrank", {"A": A * size, "B": B}) for layer in (0, 1)]
        )
    return found


def texts_of(batcher: Batcher, sampling: Sequence[Sampling], mixes: Sequence[Mix | None]) -> list[TokenSequence]:
    """A text for each prompt, in one company."""
    asked = [
        TokenSequence(list(ids), mix, Draw(how, ids, VOCABULARY), 12)
        for ids, how, mix in zip(PROMPTS, sampling, mixes, strict=True)
    ]
    for one in asked:
        batcher.add(one)
    return asked


def continued(batcher: Batcher, sampling: Sequence[Sampling], mixes: Sequence[Mix | None]) -> list[list[int]]:
    asked = texts_of(batcher, sampling, mixes)
    for event in finish(batcher):
        assert event.error is None, event.error
    return [output(one) for one in asked]


def unscreened(language: LanguageModel, sampling: Sequence[Sampling], mixes: Sequence[Mix | None]) -> list[list[int]]:
    """The same from all logits."""
    screen, language._screen = language._screen, None
    try:
        return continued(Batcher(decoder_of(language)), sampling, mixes)
    finally:
        language._screen = screen


def seen(language: LanguageModel) -> int:
    """Halves of strips that the screen has looked at so far."""
    assert language._screen is not None
    return int(language._screen.counts[1])


MIXES = [None, Mix.one_hot(0, 2), Mix.one_hot(1, 2), None, Mix.one_hot(0, 2), None]


@needs_screen
@pytest.mark.parametrize("has_tapes", [True, False])
def test_greedy_texts_are_those_of_all_logits(language: LanguageModel, has_tapes: bool) -> None:
    expected = unscreened(language, [GREEDY] * 6, MIXES)
    batcher, before = Batcher(decoder_of(language), step_tokens=40), seen(language)
    tapes = batcher.decoder.graphs
    assert isinstance(tapes, TapedDecode)
    if not has_tapes:
        batcher.decoder.graphs = None

    assert continued(batcher, [GREEDY] * 6, MIXES) == expected

    assert len({tuple(text) for text in expected}) == 6
    assert seen(language) - before == 6 * 12 * (VOCABULARY // 16 + 1)
    assert (tapes.num_played > 0) == has_tapes
    assert "8-bit weights" in language.greedy_path


@needs_screen
@pytest.mark.parametrize(
    "other", [Sampling(seed=3), Sampling(temperature=0, logprobs=2), Sampling(temperature=0, presence_penalty=1.0)]
)
def test_beside_those_that_need_all_logits_nothing_changes(language: LanguageModel, other: Sampling) -> None:
    sampling = [GREEDY, other, GREEDY, GREEDY, other, GREEDY]
    expected = unscreened(language, sampling, MIXES)
    before = seen(language)

    assert continued(Batcher(decoder_of(language)), sampling, MIXES) == expected
    assert seen(language) == before


@needs_screen
def test_numbers_that_overflow_end_their_own_text_only(language: LanguageModel) -> None:
    mixes = [None, Mix.one_hot(2, 2), *MIXES[2:]]
    batcher, before = Batcher(decoder_of(language)), seen(language)

    asked = texts_of(batcher, [GREEDY] * 6, mixes)
    failed = [event for event in finish(batcher) if event.error]

    assert [event.sequence for event in failed] == [asked[1]]
    assert isinstance(failed[0].error, NotFiniteAnswerError)
    others = [output(one) for n, one in enumerate(asked) if n != 1]
    expected = unscreened(language, [GREEDY] * 6, [None, None, *mixes[2:]])
    assert others == [text for n, text in enumerate(expected) if n != 1]
    assert seen(language) > before
    assert batcher.pool.num_held == 0


@needs_screen
@pytest.mark.parametrize(
    ("family", "changes"), [("gemma2", {}), ("gptj", {"n_embd": 256, "rotary_dim": 16}), ("llama", {"vocab_size": 300})]
)
def test_other_heads_give_all_their_logits(family: str, changes: dict[str, int]) -> None:
    """Capped logits, a bias, few tokens."""
    language = LanguageModel(causal(family, **(SIZES if family != "gptj" else {"vocab_size": VOCABULARY}) | changes))
    language.lay_out()

    assert not language.finds_likeliest(1)
    assert language.greedy_path.startswith("from all logits: the head is small, ")
