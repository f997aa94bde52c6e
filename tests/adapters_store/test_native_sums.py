"""What the native kernel adds is the equation, and a token's own: whatever its company, panel and threads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adapters_store.mixing import Mix, MixedBatch
from adapters_store.primitives import Entry, Place, cost, native
from adapters_store.primitives.lowrank import LowRankBank
from adapters_store.primitives.panels import PANEL, Panels
from tests import strategies
from tests.strategies import light
from tests.tolerances import assert_close, assert_same_bits


@light
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 600), st.booleans())
def test_factors_in_the_kernels_layout_come_back_as_they_were(rank: int, d_in: int, d_out: int, paired: bool) -> None:
    A, B = torch.randn(rank, d_in), torch.randn(d_out, rank)

    pair = native.NativePair.of(A, B, paired=paired).for_torch()

    dtype = torch.bfloat16 if paired else torch.float32
    assert_same_bits(pair.A.contiguous(), A.to(dtype))
    assert_same_bits(pair.B.contiguous(), B.to(dtype))


def test_factors_that_inference_asks_for_first_serve_training_too() -> None:
    pair = native.NativePair.of(torch.randn(3, 20), torch.randn(30, 3), paired=False)

    with torch.inference_mode():
        made = pair.for_torch()

    assert not made.A.is_inference()
    assert not made.B.is_inference()


Rows = Sequence[tuple[int, Mix | None]]


@pytest.fixture(params=["float32", "bfloat16", "bfloat16 by float32 factors"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """Each kernel in turn; the last is bfloat16's where the processor has no products for it."""
    if not native.is_active():
        pytest.skip(native.status().detail)
    if request.param.endswith("factors"):
        names = {torch.float32: "lowrank_add_f32", torch.bfloat16: "lowrank_add_bf16"}
        monkeypatch.setattr(native, "_entry_points", lambda _: names)
    native._functions.cache_clear()
    yield getattr(torch, request.param.split()[0])
    native._functions.cache_clear()


@dataclass(frozen=True)
class Filled:
    """One site with adapters, and what the kernel and the equation say of rows there."""

    bank: LowRankBank
    entries: dict[int, Entry]
    d_in: int
    d_out: int

    @staticmethod
    def of(dtype: torch.dtype, d_in: int, d_out: int, ranks: Sequence[int]) -> "Filled":
        """rank 0: the slot is an adapter's that does not touch this site."""
        place = Place("l", nn.Linear(d_in, d_out, device="meta"), d_in, d_out, 1)
        filled = Filled(LowRankBank(place, dtype, torch.device("cpu")), {}, d_in, d_out)
        generator = torch.Generator().manual_seed(0)
        for slot, rank in enumerate(ranks):
            if rank > 0:
                filled.entries[slot] = strategies.lowrank(place, generator, rank)
                filled.bank.put(slot, filled.entries[slot])
        return filled

    def randn(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """x and y: (tokens, d_in) and (tokens, d_out)."""
        generator = torch.Generator().manual_seed(1)
        x, y = (strategies.randn(generator, num_tokens, width) for width in (self.d_in, self.d_out))
        return x.to(self.bank.dtype), y.to(self.bank.dtype)

    def native(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        """y with the deltas added by the kernel."""
        batch = MixedBatch.of(rows, 3)
        if not batch.active:  # then a site does not ask its banks
            return y
        with torch.no_grad(), cost.forced("native"):
            return self.bank.add(y.clone(), x, y, batch)

    def expected(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        """The same by the equation, in float64."""
        out, at = y.double(), 0
        for length, mix in rows:
            here = slice(at, at := at + length)
            for slot, weight in zip(mix.slots, mix.weights[:, 1].tolist(), strict=True) if mix else ():
                if slot in self.entries:
                    A, B = (self.entries[slot].tensors[name].double() for name in "AB")
                    out[here] += weight * 0.5 * (x[here].double() @ A.mT @ B.mT)
        return out


@st.composite
def _decoding(draw: st.DrawFn, num_slots: int) -> list[tuple[int, Mix | None]]:
    """Many rows of a token or a few, each with a mix of its own or one of others, among some long ones."""
    some = [draw(strategies.mixes(num_slots, 3)) for _ in range(draw(st.integers(1, 12)))]
    lengths = st.one_of(st.just(1), st.integers(1, 4), st.integers(15, 70))
    size = draw(st.sampled_from([1, 5, 40, 90]))
    chosen = draw(st.lists(st.tuples(lengths, st.sampled_from([*some, None])), min_size=1, max_size=size))
    return list(chosen)


def _num_tokens(rows: Rows) -> int:
    return sum(length for length, _ in rows)


_any_ranks = st.lists(st.sampled_from([0, 1, 3, 8, 9, 16, 17, 40, 100, native.MAX_RANK]), min_size=1, max_size=12)


@light
@given(data=st.data())
def test_decoding_and_long_rows_together_are_the_equation(dtype: torch.dtype, data: st.DataObject) -> None:
    widths = st.one_of(st.integers(1, 40), st.sampled_from([128, 515, 1100]))
    ranks = data.draw(_any_ranks)
    filled, rows = Filled.of(dtype, data.draw(widths), data.draw(widths), ranks), data.draw(_decoding(len(ranks)))
    x, y = filled.randn(_num_tokens(rows))

    assert_close(filled.native(x, y, rows), filled.expected(x, y, rows), dtype)


@light
@given(data=st.data())
def test_a_token_gets_the_same_bits_alone_and_in_any_company(dtype: torch.dtype, data: st.DataObject) -> None:
    ranks = data.draw(_any_ranks)
    filled, rows = Filled.of(dtype, 61, 533, ranks), data.draw(_decoding(len(ranks)))
    x, y = filled.randn(_num_tokens(rows))

    together = filled.native(x, y, rows)

    mixes = [mix for length, mix in rows for _ in range(length)]
    for t in range(0, len(mixes), max(1, len(mixes) // 20)):
        alone = filled.native(x[t : t + 1], y[t : t + 1], [(1, mixes[t])])
        assert_same_bits(together[t : t + 1], alone)


def test_threads_share_the_panels_and_change_no_bit(dtype: torch.dtype) -> None:
    filled, generator = Filled.of(dtype, 70, 300, [16, 8, 40, 3]), np.random.default_rng(0)
    weights = generator.normal(size=(40, 2, 3)).astype(np.float32)
    rows = [(1, Mix((i % 4, (i + 1) % 4), weight)) for i, weight in enumerate(weights)] + [(90, Mix.one_hot(2, 3))]
    x, y = filled.randn(_num_tokens(rows))
    alone, threads = filled.native(x, y, rows), torch.get_num_threads()

    try:
        torch.set_num_threads(3)
        together = filled.native(x, y, rows)
    finally:
        torch.set_num_threads(threads)

    assert_same_bits(together, alone)


def test_tokens_whose_adapters_do_not_touch_the_site_keep_their_bits(dtype: torch.dtype) -> None:
    filled = Filled.of(dtype, 20, 50, [4, 0, 4, 0])
    both, absent = np.ones((2, 3), np.float32), Mix((1, 3), np.ones((2, 3), np.float32))
    rows = [(1, Mix((0, 2), both)), (1, absent), (2, Mix((0, 1), both)), (20, absent), (1, None)]
    x, y = filled.randn(_num_tokens(rows))
    y[1, :4] = torch.tensor([-0.0, 1e-39, float("inf"), float("nan")])

    found = filled.native(x, y, rows)

    assert_same_bits(found[1:2], y[1:2])
    assert_same_bits(found[4:], y[4:])
    assert_close(found[2:4], filled.expected(x, y, rows)[2:4], dtype)


def test_sums_of_many_tokens_are_kept_a_strip_of_columns_at_a_time(dtype: torch.dtype) -> None:
    filled = Filled.of(dtype, 40, 1100, [16, 9, 3])
    rows = [(1, Mix((i % 3,), np.full((1, 3), 1 + i / 200, np.float32))) for i in range(200)]  # a mix for each
    x, y = filled.randn(200)

    found = filled.native(x, y, rows)

    assert_close(found, filled.expected(x, y, rows), dtype)
    for t in range(0, 200, 40):  # alone its columns are one strip
        assert_same_bits(found[t : t + 1], filled.native(x[t : t + 1], y[t : t + 1], rows[t : t + 1]))


@pytest.mark.parametrize(("d_in", "d_out"), [(4096, 11008), (11008, 4096)])
def test_wide_layers_decode(dtype: torch.dtype, d_in: int, d_out: int) -> None:
    filled = Filled.of(dtype, d_in, d_out, [16, 64, 5])
    rows = [(1, Mix((i % 3, (i + 1) % 3), np.full((2, 3), 0.5, np.float32))) for i in range(5)]
    x, y = filled.randn(5)

    assert_close(filled.native(x, y, rows), filled.expected(x, y, rows), dtype)


@light
@given(rows=_decoding(9), threads=st.integers(1, 4))
def test_panels_hold_each_use_once_and_a_panels_adapters_in_order(rows: Rows, threads: int) -> None:
    batch = MixedBatch.of(rows, 3)
    if not batch.active:
        return
    panels = Panels.of(batch, threads)

    assert sorted(panels.tokens) == np.flatnonzero(batch.mix_of_token >= 0).tolist()
    found = []
    for (token, group), (last_token, last_group) in zip(panels.panels, panels.panels[1:], strict=False):
        assert 0 < last_token - token <= PANEL
        slots = panels.groups[group:last_group, 0].tolist()
        assert slots == sorted(set(slots))
        for slot, use, end in zip(slots, panels.groups[group:, 1], panels.groups[group + 1 :, 1], strict=False):
            assert token <= panels.uses[use:end, 0].min() <= panels.uses[use:end, 0].max() < last_token
            found += [(panels.tokens[i], pair, slot) for i, pair in panels.uses[use:end].tolist()]
    pairs = range(len(batch.pair_slot))
    tokens = [np.flatnonzero(batch.mix_of_token == batch.pair_mix[pair]) for pair in pairs]
    assert sorted(found) == sorted((t, pair, batch.pair_slot[pair]) for pair in pairs for t in tokens[pair])
