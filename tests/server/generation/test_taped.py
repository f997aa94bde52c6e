"""Decode steps from tapes give what plain steps give, while adapters come and go; what has no tape runs plainly."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from adapters_store.arena import Arena
from adapters_store.mixing import Mix, MixedBatch
from adapters_store.packing import PACKED, no_mask, packed_attention
from adapters_store.primitives import Entry, cost
from server.generation import native_attention, taped
from server.generation.batcher import Batcher
from server.generation.plan import Plan
from server.generation.taped import TapedDecode, plays_right
from tests.server.generation.test_graphs import (
    MIXES,
    assert_each_as_alone,
    decode_plan,
    engine,
    lowranks,
    mix_of,
    through,
)
from tests.tolerances import assert_same_bits

pytestmark = pytest.mark.skipif(
    not native_attention.supports(torch.float32, torch.device("cpu")), reason="needs a C compiler"
)
AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, no_mask)
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "opt", "gpt_neox"]


def tapes_of(batcher: Batcher) -> TapedDecode:
    tapes = batcher.decoder.graphs
    assert isinstance(tapes, TapedDecode)
    return tapes


@pytest.mark.parametrize("family", FAMILIES)
def test_families_decode_from_tapes_as_without_them(family: str) -> None:
    plain = engine(family)
    plain.decoder.graphs = None
    expected = through(plain, [None] * 3)
    batcher = engine(family)

    assert through(batcher, [None] * 3) == expected
    assert tapes_of(batcher).num_played == 3
    assert batcher.decoder.decoding_path == "tapes of what the model computes"


def test_compositions_decode_together_as_each_alone_while_adapters_come_and_go() -> None:
    batcher = engine("llama")

    assert_each_as_alone(batcher)

    assert tapes_of(batcher).num_played == 3


@torch.inference_mode()
def test_one_tape_serves_all_mixes_with_the_bits_of_plain_steps() -> None:
    decoder = engine("llama").decoder
    tapes = decoder.graphs
    assert isinstance(tapes, TapedDecode)
    for mixes in ([None, None], [mix_of(0, 1), None], [mix_of(4), mix_of(0, 1, 2)], [None, None], [mix_of(1)] * 2):
        plan, _ = decode_plan([(20, mixes[0]), (5, mixes[1])])
        batch = MixedBatch.of(plan.rows, 2)
        found = tapes.logits(plan, batch)
        assert found is not None
        found = found.clone()
        with cost.forced("native"):
            assert_same_bits(found, decoder._eager(plan))
    assert len(tapes._tapes) == 1


def test_steps_that_need_more_than_low_ranks_run_the_usual_way() -> None:
    batcher = engine("llama")
    tapes, sites = tapes_of(batcher), batcher.decoder.encoder.sites
    name = next(name for name, site in sites.items() if "norm" in name)
    entries = lowranks(batcher.decoder.language, 4, torch.Generator().manual_seed(3))
    scale = torch.full((sites[name].place.d_out,), 1.5)
    sites.put(1, [*entries, Entry(name, "scale_shift", {"scale": scale})])

    with torch.inference_mode():
        assert tapes.logits(*decode_plan([(3, mix_of(1))])) is None
        assert tapes.logits(*decode_plan([(3, mix_of(2))])) is not None


@torch.inference_mode()
def test_tapes_are_forgotten_with_their_layout_and_beyond_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taped, "MOST", 2)
    batcher = engine("llama")
    tapes, sites = tapes_of(batcher), batcher.decoder.encoder.sites

    def rows_of_tapes() -> list[int]:
        return [shape.rows for shape in tapes._tapes]

    for rows in (1, 2, 3, 2, 4):
        tapes.logits(*decode_plan([(3, None)] * rows))
    assert rows_of_tapes() == [2, 4]
    sites.put(3, lowranks(batcher.decoder.language, 9, torch.Generator()))
    tapes.logits(*decode_plan([(3, mix_of(3))]))
    assert rows_of_tapes() == [4, 1]
    sites.drop(0), sites.drop(1), sites.drop(2)  # the last with even ranks: their sites have none any more
    tapes.logits(*decode_plan([(3, None)] * 2))
    assert rows_of_tapes() == [2]


def test_what_has_no_room_runs_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, batcher = through(engine("llama"), MIXES), engine("llama")
    tapes_of(batcher)._arena = Arena(1 << 11)

    assert through(batcher, MIXES) == expected
    assert tapes_of(batcher).num_played == 0
    assert "not everywhere: what it makes does not fit" in batcher.decoder.decoding_path
    monkeypatch.setattr(taped, "ARENA_BYTES", 1 << 11)
    decoder = engine("llama").decoder
    assert decoder.graphs is None  # found out at the start
    assert decoder.decoding_path == "through the model's own code"


Break = Callable[[Callable[..., Tensor], Tensor], Tensor]


def _counts(embed: Callable[..., Tensor], ids: Tensor) -> Tensor:
    return embed(ids) + len(set(ids.flatten().tolist()))


def _reads(embed: Callable[..., Tensor], ids: Tensor) -> Tensor:
    return embed(ids) * (2 if int(ids.sum()) % 2 else 3)


@pytest.mark.parametrize("odd", [_counts, _reads])
def test_a_model_that_looks_at_its_tokens_has_no_tapes(odd: Break) -> None:
    decoder = engine("llama").decoder
    embedding = decoder.encoder.model.get_input_embeddings()  # type: ignore[operator]
    own = type(embedding).forward
    embedding.forward = lambda ids: odd(lambda x: own(embedding, x), ids)

    assert not decoder._plays_right()


def test_a_tape_that_gives_something_else_is_found_out() -> None:
    decoder = engine("llama").decoder
    steps = [decode_plan([(3 + n, None), (5 + n, None)])[0] for n in range(3)]

    def off_by_little(plan: Plan) -> Tensor:
        return decoder._eager(plan).mul_(1 + 1e-6)

    with torch.inference_mode():
        assert plays_right(decoder._taped(64), steps, decoder._eager)
        assert not plays_right(decoder._taped(64), steps, off_by_little)


def test_no_rows_are_no_step() -> None:
    batcher = engine("llama")

    assert tapes_of(batcher).logits(Plan([], torch.device("cpu")), MixedBatch.of([], 2)) is None


def test_mixes_of_no_weight_are_none() -> None:
    batcher = engine("llama")
    bare = through(batcher, [None])

    assert through(batcher, [Mix((0,), mix_of(0).weights * 0)]) == bare
    assert tapes_of(batcher).num_played > 0
