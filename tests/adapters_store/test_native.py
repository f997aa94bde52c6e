"""The native kernel is built once, checked before it serves, and never missed: torch serves where it cannot."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adapters_store.mixing import Mix, MixedBatch
from adapters_store.primitives import Entry, Place, cost, native
from adapters_store.primitives.calibration import calibrate_lowrank
from adapters_store.primitives.lowrank import LowRankBank
from adapters_store.primitives.panels import PANEL, Panels
from tests import strategies
from tests.strategies import OneSite, light
from tests.tolerances import assert_close, assert_same_bits

ROOT = Path(__file__).parents[2]
HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")
# Says the status, and answers a mixed batch through a linear layer and through the reference.
ANSWER = """
import json, torch
from adapters_store.mixing import Mix, MixedBatch
from adapters_store.primitives import Entry, native
from adapters_store.sites import Sites
torch.manual_seed(0)
backbone = torch.nn.ModuleDict({"l": torch.nn.Linear(20, 30)})
sites = Sites(backbone, 20, keeps_reference=True)
sites.put(0, [Entry("l", "lowrank", {"A": torch.randn(4, 20), "B": torch.randn(30, 4)}, {"scale": 0.5})])
batch, x = MixedBatch.of([(5, Mix.one_hot(0, 1)), (4, None)], 1), torch.randn(9, 20)
with torch.no_grad():
    with sites.mixing(batch):
        found = backbone["l"](x)
    with sites.mixing(batch, reference=True):
        expected = backbone["l"](x)
status = native.status()
print(json.dumps([status.active, status.detail, torch.allclose(found, expected, atol=1e-5)]))
"""


def _start(cache: Path, **changes: str) -> subprocess.Popen:
    environment = os.environ | {"ESPALIER_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | changes
    environment.pop("CC", None)
    return subprocess.Popen(
        [sys.executable, "-c", ANSWER], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _answer(process: subprocess.Popen) -> tuple[bool, str, bool]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return tuple(json.loads(out.splitlines()[-1]))


def test_switched_off_torch_serves_and_the_status_says_so(tmp_path: Path) -> None:
    active, detail, right = _answer(_start(tmp_path, ESPALIER_NATIVE="0"))

    assert (active, right) == (False, True)
    assert "ESPALIER_NATIVE=0" in detail
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_torch_serves_and_the_status_says_why(tmp_path: Path) -> None:
    active, detail, right = _answer(_start(tmp_path, PATH=""))

    assert (active, right) == (False, True)
    assert "no C compiler" in detail


def test_a_cache_that_cannot_be_written_leaves_torch_serving(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    active, detail, right = _answer(_start(tmp_path / "file" / "cache"))

    assert (active, right) == (False, True)
    assert "not built" in detail


@needs_compiler
def test_two_processes_that_build_at_once_leave_one_library_which_the_next_reuses(tmp_path: Path) -> None:
    both = [_start(tmp_path) for _ in range(2)]

    answers = [_answer(process) for process in both]

    assert [(active, right) for active, _, right in answers] == [(True, True)] * 2
    built = list(tmp_path.iterdir())
    assert [path.suffix for path in built] == [".so"]
    before = built[0].stat().st_mtime_ns
    active, _, right = _answer(_start(tmp_path, PATH=os.environ["PATH"]))
    assert (active, right) == (True, True)
    assert built[0].stat().st_mtime_ns == before


@needs_compiler
def test_the_kernel_serves_here() -> None:
    assert native.status().active, native.status().detail


def test_tables_grow_and_keep_what_they_hold() -> None:
    table = native.Table()

    table.fill(2, 3, None)
    table.reach(1000)
    table.fill(7, 9, None)

    assert len(table.ranks) > 1000
    assert (table.ranks[2], table.ranks[7], table.ranks[1000]) == (3, 9, 0)
    assert table.ranks.sum() == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibration_fits_every_form_and_leaves_results_alone(dtype: torch.dtype) -> None:
    one, generator = OneSite.of(lambda: torch.nn.Linear(64, 64), dtype), torch.Generator().manual_seed(0)
    one.sites.put(0, [strategies.lowrank(one.place, generator)])
    x, rows = strategies.randn(generator, 9, 64).to(dtype), [(9, Mix.one_hot(0, 3))]

    calibrate_lowrank(dtype, torch.device("cpu"))

    fitted = cost._coefficients[dtype]
    assert all(len(fitted[form]) == 3 and min(fitted[form]) >= 0 and max(fitted[form]) > 0 for form in cost.FORMS)
    with torch.no_grad(), one.sites.mixing(MixedBatch.of(rows, 3)):
        found = one.place.module(x)
    with torch.no_grad(), one.sites.mixing(MixedBatch.of(rows, 3), reference=True):
        torch.testing.assert_close(found, one.place.module(x), rtol=2e-2, atol=2e-2)


@light
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 600), st.booleans())
def test_factors_in_the_kernels_layout_come_back_as_they_were(rank: int, d_in: int, d_out: int, paired: bool) -> None:
    A, B = torch.randn(rank, d_in), torch.randn(d_out, rank)

    pair = native.NativePair.of(A, B, paired=paired).for_torch()

    dtype = torch.bfloat16 if paired else torch.float32
    assert_same_bits(pair.A.contiguous(), A.to(dtype))
    assert_same_bits(pair.B.contiguous(), B.to(dtype))


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


@pytest.fixture(autouse=True)
def _own_coefficients() -> object:
    """Calibrating here must not decide the forms of other tests."""
    kept = dict(cost._coefficients)
    yield
    cost._coefficients.clear()
    cost._coefficients.update(kept)


# tokens, mixes, rank, width: unlike the probes that calibrate
CASES = [(32, 1, 4, 256), (300, 12, 8, 512), (900, 3, 32, 384), (128, 32, 8, 768), (600, 30, 16, 256)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_calibration_the_chosen_form_is_near_the_best(dtype: torch.dtype) -> None:
    start = time.perf_counter()
    calibrate_lowrank(dtype, torch.device("cpu"))
    assert time.perf_counter() - start < 1.5

    for tokens, num_mixes, rank, width in CASES:
        one = OneSite.of(lambda width=width: torch.nn.Linear(width, width), dtype)
        generator = torch.Generator().manual_seed(0)
        for slot in range(num_mixes):
            one.sites.put(slot, [strategies.lowrank(one.place, generator, rank)])
        bank, x = one.sites[one.place.name].banks["lowrank"], strategies.randn(generator, tokens, width).to(dtype)
        batch = MixedBatch.of([(tokens // num_mixes, Mix.one_hot(slot, 3)) for slot in range(num_mixes)], 3)
        x = x[: batch.num_tokens]
        ranks, times = torch.full((num_mixes,), rank).numpy(), {}
        for form in cost.FORMS:
            with cost.forced(form), torch.no_grad():
                times[form] = cost._microseconds(lambda bank=bank, x=x, batch=batch: bank.add(x.clone(), x, x, batch))
        chosen = cost.cheapest(batch, ranks, width, width, dtype, native.is_active())
        assert times[chosen] <= 4 * min(times.values()), (tokens, num_mixes, rank, width, chosen, times)
