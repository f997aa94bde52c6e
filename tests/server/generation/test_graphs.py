"""Decode steps over static buffers give what plain steps give; on a GPU they are captured and replayed.

Without a GPU the same forward runs eagerly over the same buffers, with kernels in Triton's interpreter.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface

from adapters_store.language import LanguageModel
from adapters_store.mixing import Mix, MixedBatch
from adapters_store.packing import PACKED, no_mask, packed_attention
from adapters_store.primitives import Entry
from adapters_store.primitives.grouping import Grouping
from server.generation.batcher import Batcher
from server.generation.decoder import Decoder
from server.generation.graphs import GraphedDecode, Shape, StepBuffers, _grouped
from server.generation.layout import Layout
from server.generation.pages import PAGE, pages_for
from server.generation.plan import Chunk, Plan
from server.generation.sampling import Draw, Sampling
from server.generation.sequence import TokenSequence
from tests.server.generation import families
from tests.triton_cases import devices, run_interpreted, starts_itself

AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, no_mask)
RANKS = [4, 16, 20, 3, 5]
CPU = torch.device("cpu")


@starts_itself
def test_all_of_this_holds_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs triton")
    run_interpreted(__file__)


def sequence(ids: list[int], mix: Mix | None = None, pages: list[int] | None = None, new: int = 4) -> TokenSequence:
    made = TokenSequence(list(ids), mix, Draw(Sampling(temperature=0), ids, 97), max_tokens=new)
    made.pages = pages or []
    return made


def decode_plan(rows: list[tuple[int, Mix | None]], device: str = "cpu") -> tuple[Plan, MixedBatch]:
    """Sequences of some lengths, on neighbouring pages, the last token of each to be computed."""
    chunks, page = [], 0
    for length, mix in rows:
        pages = list(range(page, page + pages_for(length)))
        page += len(pages)
        chunks.append(Chunk(sequence(list(range(1, length + 1)), mix, pages), length - 1, 1))
    plan = Plan(chunks, torch.device(device))
    return plan, MixedBatch.of(plan.rows, 2, device)


def mix_of(*slots: int, weight: float = 0.5) -> Mix:
    return Mix(slots, np.full((len(slots), 2), weight, np.float32))


def test_buffers_hold_the_step_and_idle_rows_behind_it() -> None:
    plan, batch = decode_plan([(40, mix_of(1, 3)), (16, None), (17, mix_of(1, 3)), (1, mix_of(2))])
    buffers = StepBuffers(Shape(8, 32, 2), num_layers=2, idle_page=77, device=CPU)

    buffers.load(plan, batch)

    for name in ("ids", "positions", "places", "lengths"):
        assert getattr(buffers, name)[:4].equal(getattr(plan, name)), name
    assert buffers.tables[:4, : plan.tables.shape[1]].equal(plan.tables)
    assert buffers.places[4:].tolist() == [77 * PAGE] * 4
    assert buffers.lengths[4:].tolist() == [1] * 4
    assert (buffers.tables[4:] == 77).all()
    own, held = Grouping.of(batch), buffers.grouping
    assert held.tiles[: len(own.tiles)].equal(own.tiles)
    assert not held.tiles[len(own.tiles) :].any()
    assert held.pair_slot[:3].equal(own.pair_slot)
    assert held.weights[:, :3].equal(own.weights)


def test_the_next_step_leaves_nothing_of_the_last() -> None:
    buffers = StepBuffers(Shape(4, 32, 2), num_layers=2, idle_page=77, device=CPU)
    addresses = [part.data_ptr() for part in (buffers.ids, buffers.tables, buffers.grouping.tiles)]
    buffers.load(*decode_plan([(40, mix_of(1, 3)), (50, mix_of(0, 2)), (3, mix_of(0))]))

    buffers.load(*decode_plan([(5, None), (2, mix_of(2))]))

    assert [part.data_ptr() for part in (buffers.ids, buffers.tables, buffers.grouping.tiles)] == addresses
    assert buffers.lengths.tolist() == [5, 2, 1, 1]
    assert buffers.tables[2:].unique().tolist() == [77]
    assert buffers.grouping.tiles.tolist() == [[1, 1, 0, 1], *([[0] * 4] * 3)]


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        ([(3, None)], (1, 32, 0)),
        ([(513, None)] * 3, (4, 64, 0)),
        ([(9, mix_of(0, 1, 2))] + [(9, None)] * 16, (32, 32, 4)),
        ([(1025, mix_of(0))] * 40, (48, 128, 1)),
    ],
)
def test_steps_share_buckets(rows: list[tuple[int, Mix | None]], shape: tuple[int, int, int]) -> None:
    assert Shape.of(*decode_plan(rows)) == shape


def engine(family: str, device: str = "cpu", step_tokens: int = 64) -> Batcher:
    language = LanguageModel(families.causal(family).to(device), keeps_reference=True)
    generator = torch.Generator().manual_seed(0)
    for slot, rank in enumerate(RANKS if family == "llama" else []):
        language.encoder.sites.put(slot, lowranks(language, rank, generator))
    return Batcher(Decoder(language, kv_bytes=2**20), step_tokens=step_tokens)


def lowranks(language: LanguageModel, rank: int, generator: torch.Generator) -> list[Entry]:
    """Adapters at every other linear layer, others for odd ranks than for even ones."""
    entries = []
    linears = [site.place for site in language.encoder.sites.values() if isinstance(site.place.module, torch.nn.Linear)]
    for place in linears[rank % 2 :: 2]:
        A = torch.randn(rank, place.d_in, generator=generator) / place.d_in**0.5
        B = torch.randn(place.d_out, rank, generator=generator) / rank**0.5
        entries.append(Entry(place.name, "lowrank", {"A": A, "B": B}, {"scale": 0.5}))
    return entries


def prompt_of(n: int) -> list[int]:
    return [(7 * i + 3 * n) % 95 + 1 for i in range(4 + 5 * n)]


def through(
    batcher: Batcher, mixes: list[Mix | None], between: Callable[[int], None] = lambda step: None
) -> list[list[int]]:
    """Greedy continuations of prompts of several lengths under these mixes, together."""
    sequences = [sequence(prompt_of(n), mix) for n, mix in enumerate(mixes)]
    for each in sequences:
        batcher.add(each)
    step = 0
    while batcher.has_work:
        for event in batcher.step():
            assert event.error is None, event.error
        between(step)
        step += 1
    return [each.ids[each.num_prompt :] for each in sequences]


class Counted(GraphedDecode):
    """Counts the steps it served."""

    served = 0

    def logits(self, plan: Plan, batch: MixedBatch) -> torch.Tensor | None:
        found = super().logits(plan, batch)
        self.served += found is not None
        return found


def with_graphs(batcher: Batcher, *, captures: bool) -> Counted:
    decoder = batcher.decoder
    counted = decoder.graphs = Counted(
        decoder._over_buffers, decoder.encoder.sites, idle_page=decoder.memory.idle_page, captures=captures
    )
    return counted


@devices
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_families_decode_over_buffers_as_without_them(device: str, family: str) -> None:
    expected = through(engine(family, device), [None] * 3)
    batcher = engine(family, device)
    graphs = with_graphs(batcher, captures=device == "cuda")

    assert through(batcher, [None] * 3) == expected
    assert graphs.served == 3
    assert graphs.failure is None


MIXES = [mix_of(0, 1), None, mix_of(2, 4, weight=0.8), mix_of(0, 1, 2, weight=0.3), mix_of(0, 1)]


def assert_each_as_alone(batcher: Batcher) -> None:
    """MIXES continue together as the reference continues each alone, while adapters that nobody uses come and go."""
    language, generator = batcher.decoder.language, torch.Generator().manual_seed(9)
    sites = language.encoder.sites

    def change(step: int) -> None:
        if step == 0:
            sites.put(3, lowranks(language, 8, generator))
        elif step == 1:
            sites.drop(3)
        elif step == 2:
            sites.put(200, lowranks(language, 40, generator))  # more slots, and more ranks: tables move

    found = through(batcher, MIXES, change)
    for n, mix in enumerate(MIXES):
        ids = prompt_of(n)
        for token in found[n]:
            with torch.no_grad():
                states = language.encoder.states([ids], [mix], reference=True)[0]
                logits = language.logits(states[-1:])[0]
            assert logits[token] >= logits.max() - 1e-4
            ids.append(token)


@devices
def test_compositions_decode_together_as_each_alone_while_adapters_come_and_go(device: str) -> None:
    batcher = engine("llama", device)
    graphs = with_graphs(batcher, captures=device == "cuda")

    assert_each_as_alone(batcher)

    assert graphs.served == 3


@devices
def test_the_layout_changes_with_what_launches_depend_on_and_with_nothing_else(device: str) -> None:
    language, generator = engine("llama", device).decoder.language, torch.Generator().manual_seed(9)
    sites = language.encoder.sites
    first = Layout.of(sites, _grouped)

    sites.put(3, lowranks(language, 9, generator))
    assert Layout.of(sites, _grouped) == first
    sites.put(3, lowranks(language, 33, generator))
    wider = Layout.of(sites, _grouped)
    assert wider != first
    sites.drop(3)
    sites.drop(2)
    assert Layout.of(sites, _grouped) == wider
    sites.drop(4)  # the last one at its sites
    assert Layout.of(sites, _grouped) != wider


@devices
def test_steps_that_need_more_than_low_ranks_run_the_usual_way(device: str) -> None:
    batcher = engine("llama", device)
    graphs, sites = with_graphs(batcher, captures=device == "cuda"), batcher.decoder.encoder.sites
    name = next(name for name, site in sites.items() if "norm" in name)
    entries = lowranks(batcher.decoder.language, 4, torch.Generator().manual_seed(3))
    scale = torch.full((sites[name].place.d_out,), 1.5)
    sites.put(1, [*entries, Entry(name, "scale_shift", {"scale": scale})])

    needs_more, does_not = decode_plan([(3, mix_of(1))], device), decode_plan([(3, mix_of(2))], device)

    assert graphs.logits(*needs_more) is None
    assert graphs.logits(*does_not) is not None


class NothingIsReadBack(TorchDispatchMode):
    """Fails where a forward looks at numbers on the device: a capture would not survive it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")), name
        return function(*args, **(kwargs or {}))


@devices
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_nothing_in_the_forward_waits_for_the_device(device: str, family: str) -> None:
    decoder = engine(family, device).decoder
    plan, batch = decode_plan([(20, None), (5, None), (3, None)], device)
    buffers = StepBuffers(Shape.of(plan, batch), 2, decoder.memory.idle_page, torch.device(device))
    buffers.load(plan, batch)

    with torch.no_grad(), NothingIsReadBack():
        decoder._over_buffers(buffers, MixedBatch.of([(buffers.num_singles, None)], 2, torch.device(device)))
