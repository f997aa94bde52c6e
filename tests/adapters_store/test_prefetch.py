"""A linear layer on a tape asks for the factors that are read next: for those in use, and at the cost of no bit."""

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters_store import linear, tape
from adapters_store.arena import Arena
from adapters_store.linear import Strips
from adapters_store.mixing import Mix, MixedBatch
from adapters_store.primitives import native
from adapters_store.primitives.native import NativePair, Standing, Table
from tests.adapters_store.native_linear import DTYPES, needs_kernel
from tests.strategies import light, randn
from tests.tolerances import assert_same_bits

pytestmark = needs_kernel
SLOTS = 5


@dataclass(frozen=True)
class Case:
    """A layer with adapters in all slots but the last, and a batch of single tokens."""

    x: Tensor
    strips: Strips
    pairs: list[NativePair]
    batch: MixedBatch

    @staticmethod
    def of(dtype: torch.dtype, d_in: int, d_out: int, mixes: list[Mix | None], ranks: list[int]) -> "Case":
        generator = torch.Generator().manual_seed(d_in)
        weight = randn(generator, d_out, d_in).to(dtype)
        pairs = [
            NativePair.of(randn(generator, rank, d_in), randn(generator, d_out, rank), paired=native.is_paired(dtype))
            for rank in ranks
        ]
        x = randn(generator, len(mixes), d_in).to(dtype)
        return Case(x, Strips.of(weight), pairs, MixedBatch.of([(1, mix) for mix in mixes], 1))

    @property
    def table(self) -> Table:
        found = Table()
        for slot, pair in enumerate(self.pairs):
            found.fill(slot, pair.rank, pair)
        return found

    def run(self, table: Table, batch: MixedBatch) -> Tensor:
        y = linear.linear(self.x, self.strips)
        if batch.mixes:
            native.add(y, self.x, table, batch, 0)
        return y

    def recorded(self, table: Table, standing: Standing) -> tape.Tape:
        batch = MixedBatch.of([(len(self.x), Mix.one_hot(0, 1))], 1)
        batch.memo[native.PREPARED] = standing
        found = tape.record(lambda: self.run(table, batch), Arena(1 << 20))
        assert isinstance(found, tape.Tape)
        return found


def listed(standing: Standing) -> set[tuple[int, int]]:
    """(address, lines) of each run in the list that the tape has made last."""
    num_runs, lines, *runs = np.ctypeslib.as_array(
        (ctypes.c_int64 * (2 + 2 * linear.RUNS)).from_address(standing.read_next)
    ).tolist()
    found = set(zip(runs[: 2 * num_runs : 2], runs[1 : 2 * num_runs : 2], strict=True))
    assert len(found) == num_runs
    assert sum(run[1] for run in found) == lines
    return found


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    mix = st.none() | st.sets(st.integers(0, SLOTS - 1), min_size=1, max_size=3).map(
        lambda slots: Mix(tuple(sorted(slots)), np.linspace(0.5, 1, len(slots), dtype=np.float32)[:, None])
    )
    return Case.of(
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(1, 300)),
        draw(st.integers(1, 200)),
        draw(st.lists(mix, min_size=1, max_size=40)),
        draw(st.lists(st.integers(1, 40), min_size=SLOTS - 1, max_size=SLOTS - 1)),
    )


@settings(light, max_examples=150)
@given(any_case())
def test_a_layer_that_asks_for_factors_gives_the_same_bits(case: Case) -> None:
    table, standing = case.table, Standing()
    player = case.recorded(table, standing)
    standing.load(case.batch)

    assert_same_bits(player.play(), case.run(table, case.batch))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_asked_for_are_the_factors_in_use(dtype: torch.dtype) -> None:
    used = [Mix.one_hot(1, 1), None, Mix.one_hot(3, 1), Mix.one_hot(SLOTS - 1, 1), Mix.one_hot(1, 1)]
    mixes = [*used, *[None] * linear.idle_rows()]
    case = Case.of(dtype, 64, 96, mixes, [8, 16, 8, 32])
    table, standing = case.table, Standing()
    player = case.recorded(table, standing)
    standing.load(case.batch)

    player.play()

    factors = [factor for slot in (1, 3) for factor in (case.pairs[slot].a, case.pairs[slot].b)]
    assert listed(standing) == {(factor.data_ptr(), factor.nbytes // 64) for factor in factors}
    standing.load(MixedBatch.of([(len(mixes), None)], 1))
    player.play()
    assert listed(standing) == set()


def test_few_rows_ask_for_nothing_because_they_wait_for_their_weights() -> None:
    case = Case.of(torch.float32, 64, 96, [Mix.one_hot(0, 1)] * (linear.idle_rows() - 1), [8] * 4)
    table, standing = case.table, Standing()
    standing.load(case.batch)

    assert case.recorded(table, standing).num_calls == 2


def test_more_adapters_than_the_list_holds_are_asked_for_in_part() -> None:
    count = linear.RUNS
    case = Case.of(torch.float32, 64, 96, [Mix.one_hot(slot, 1) for slot in range(count)], [8] * count)
    table, standing = case.table, Standing()
    player = case.recorded(table, standing)
    standing.load(case.batch)

    assert_same_bits(player.play(), case.run(table, case.batch))
    assert len(listed(standing)) == linear.RUNS
