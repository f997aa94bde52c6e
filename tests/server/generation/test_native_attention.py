"""The C kernel gives what plain attention gives in all shapes; a row never sees its neighbours or the threads."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters_store.packing import Scoring
from server.generation import native_attention
from server.generation.attention import attend_padded, attend_rows, store
from server.generation.pages import PAGE, pages_for
from tests.strategies import light, randn
from tests.tolerances import assert_close, assert_same_bits
from tests.without_kernel import said, without_kernel

HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")
DTYPES = (torch.float32, torch.bfloat16)
STATUS = """
import json, torch
from server.generation import native_attention
status = native_attention.status()
print(json.dumps([status.active, status.detail, native_attention.supports(torch.float32, torch.device("cpu"))]))
"""


@dataclass(frozen=True)
class Rows:
    """Sequences of some lengths, all but the last token of each in pages; what was never written is NaN."""

    query: Tensor  # (heads, rows, d)
    key: Tensor
    value: Tensor
    keys: Tensor  # (pages, kv_heads, PAGE, d)
    values: Tensor
    tables: Tensor
    lengths: Tensor
    window: int | None = None
    softcap: float | None = None

    @staticmethod
    def of(
        lengths: list[int], kv_heads: int = 2, group: int = 2, d: int = 32, d_v: int = 32,
        dtype: torch.dtype = torch.float32, window: int | None = None, softcap: float | None = None, seed: int = 0,
    ) -> "Rows":  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        rows, heads, num_pages = len(lengths), kv_heads * group, sum(map(pages_for, lengths)) + 2
        order = torch.randperm(num_pages, generator=generator)
        tables = torch.zeros(rows, max(map(pages_for, lengths)) + 1, dtype=torch.int64)
        keys = torch.full((num_pages, kv_heads, PAGE, d), torch.nan, dtype=dtype)
        values = torch.full((num_pages, kv_heads, PAGE, d_v), torch.nan, dtype=dtype)
        for row, length in enumerate(lengths):
            count = pages_for(length)
            tables[row, :count], order = order[:count], order[count:]
            for t in range(length - 1):
                page = tables[row, t // PAGE]
                keys[page, :, t % PAGE] = randn(generator, kv_heads, d).to(dtype)
                values[page, :, t % PAGE] = randn(generator, kv_heads, d_v).to(dtype)
        fused = randn(generator, 1, rows, heads * d + kv_heads * (d + d_v)).to(dtype)  # as a fused projection gives it
        query, key, value = fused.split([heads * d, kv_heads * d, kv_heads * d_v], -1)
        query, key, value = (
            part.view(1, rows, n, -1).transpose(1, 2)[0]
            for part, n in ((query, heads), (key, kv_heads), (value, kv_heads))
        )
        return Rows(query, key, value, keys, values, tables, torch.tensor(lengths), window, softcap)

    @property
    def scoring(self) -> Scoring:
        return Scoring(0.3, is_causal=True, window=self.window, softcap=self.softcap)

    def decode(self) -> Tensor:
        """Of copies of the pages, so that each call finds them as they were."""
        return native_attention.decode(
            self.query, self.key, self.value, self.keys.clone(), self.values.clone(), self.tables, self.lengths,
            self.scoring,
        )  # fmt: skip

    def row(self, index: int) -> "Rows":
        """One row alone, its pages elsewhere."""
        one, count = slice(index, index + 1), pages_for(int(self.lengths[index]))
        table = self.tables[index, :count]
        return replace(
            self, query=self.query[:, one], key=self.key[:, one], value=self.value[:, one],
            keys=self.keys[table].flip(0), values=self.values[table].flip(0),
            tables=torch.arange(count).flip(0)[None], lengths=self.lengths[one],
        )  # fmt: skip


def reference(rows: Rows) -> Tensor:
    """(rows, heads, d_v) in float64, row by row and head by head."""
    heads, num_rows, _ = rows.query.shape
    group = heads // rows.keys.shape[1]
    out = torch.zeros(num_rows, heads, rows.values.shape[-1], dtype=torch.float64)
    for row, length in enumerate(rows.lengths.tolist()):
        first = max(0, length - rows.window) if rows.window else 0
        for h in range(heads):
            key, value = (
                torch.cat([*(pages[page, h // group] for page in rows.tables[row])])[: length - 1].double()
                for pages in (rows.keys, rows.values)
            )
            key = torch.cat([key, rows.key[h // group, row][None].double()])[first:]
            value = torch.cat([value, rows.value[h // group, row][None].double()])[first:]
            scores = 0.3 * (key @ rows.query[h, row].double())
            if rows.softcap:
                scores = rows.softcap * torch.tanh(scores / rows.softcap)
            out[row, h] = scores.softmax(0) @ value
    return out


WIDTHS = st.sampled_from([2, 5, 8, 16, 20, 32, 47, 64, 80, 96, 128, 256])
SHAPES = st.fixed_dictionaries(
    {
        "kv_heads": st.integers(1, 5),
        "group": st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 12]),
        "d": WIDTHS,
        "d_v": WIDTHS,
        "dtype": st.sampled_from(DTYPES),
        "window": st.none() | st.integers(1, 200),
        "softcap": st.none() | st.sampled_from([0.5, 3.0, 50.0]),
        "seed": st.integers(0, 1000),
    }
)


@st.composite
def any_rows(draw: st.DrawFn) -> Rows:
    lengths = draw(st.lists(st.integers(1, 50) | st.integers(120, 290), min_size=1, max_size=4))
    return Rows.of(lengths, **draw(SHAPES))


@needs_compiler
def test_the_kernel_serves_here() -> None:
    assert native_attention.status().active, native_attention.status().detail
    assert all(native_attention.supports(dtype, torch.device("cpu")) for dtype in DTYPES)
    assert not native_attention.supports(torch.float16, torch.device("cpu"))
    assert not native_attention.supports(torch.float32, torch.device("cuda"))


def assert_rounded(found: Tensor, expected: Tensor) -> None:
    """Float32 sums of exact numbers, rounded once to the nearest of the dtype, in bfloat16 8 bits."""
    half_a_unit = 2.0**-8 if found.dtype == torch.bfloat16 else 0.0
    assert ((found.double() - expected).abs() <= half_a_unit * 1.01 * expected.abs() + 1e-5).all()


@needs_compiler
@settings(light, max_examples=100)
@given(any_rows())
def test_decoding_is_attention_over_the_rows_pages(rows: Rows) -> None:
    found = rows.decode()

    assert found.dtype == rows.query.dtype
    assert_rounded(found, reference(rows))


@pytest.mark.parametrize("attend", [attend_rows, attend_padded])
@light
@given(rows=any_rows())
def test_torchs_forms_are_too_whatever_lies_in_the_pages_of_others(attend: Callable[..., Tensor], rows: Rows) -> None:
    places = rows.tables.gather(1, (rows.lengths[:, None] - 1) // PAGE)[:, 0] * PAGE + (rows.lengths - 1) % PAGE
    keys, values = rows.keys.clone(), rows.values.clone()
    store(keys, rows.key, places)
    store(values, rows.value, places)

    found = attend(rows.query.transpose(0, 1), keys, values, rows.tables, rows.lengths, rows.scoring)

    assert_close(found, reference(rows), rows.query.dtype)


@needs_compiler
@light
@given(any_rows())
def test_a_row_is_the_same_bit_for_bit_alone_and_in_other_pages(rows: Rows) -> None:
    together = rows.decode()

    alone = [rows.row(index).decode() for index in range(len(rows.lengths))]

    assert_same_bits(torch.cat(alone), together)


@needs_compiler
@light
@given(any_rows(), st.integers(1, 5))
def test_threads_change_no_bit(two_threads: None, rows: Rows, times: int) -> None:
    many = Rows.of(rows.lengths.tolist() * times, 3, 2, window=rows.window, seed=times)
    on_two = [rows.decode(), many.decode()]

    torch.set_num_threads(1)
    on_one = [rows.decode(), many.decode()]

    torch.set_num_threads(2)
    for found, expected in zip(on_two, on_one, strict=True):
        assert_same_bits(found, expected)


@needs_compiler
@light
@given(any_rows())
def test_decoding_writes_the_new_token_into_its_place_and_nothing_else(rows: Rows) -> None:
    keys, values = rows.keys.clone(), rows.values.clone()
    native_attention.decode(rows.query, rows.key, rows.value, keys, values, rows.tables, rows.lengths, rows.scoring)

    for row, length in enumerate(rows.lengths.tolist()):
        page = rows.tables[row, (length - 1) // PAGE]
        rows.keys[page, :, (length - 1) % PAGE] = rows.key[:, row]
        rows.values[page, :, (length - 1) % PAGE] = rows.value[:, row]
    assert_same_bits(keys, rows.keys)
    assert_same_bits(values, rows.values)
    found = native_attention.decode(rows.query, None, None, keys, values, rows.tables, rows.lengths, rows.scoring)
    assert_same_bits(found, rows.decode())


@needs_compiler
@light
@given(st.data(), st.sampled_from(DTYPES), st.integers(1, 4), st.integers(1, 70), st.integers(1, 70))
def test_appending_puts_each_token_in_its_place_and_nothing_else(
    data: st.DataObject, dtype: torch.dtype, kv_heads: int, d: int, d_v: int
) -> None:
    generator, num_pages = torch.Generator().manual_seed(d), 5
    places = torch.tensor(data.draw(st.lists(st.integers(0, num_pages * PAGE - 1), unique=True)), dtype=torch.int64)
    pools = [randn(generator, num_pages, kv_heads, PAGE, width).to(dtype) for width in (d, d_v)]
    fresh = [randn(generator, len(places), kv_heads, width).to(dtype).transpose(0, 1) for width in (d, d_v)]
    expected = [pool.clone() for pool in pools]
    for pool, new in zip(expected, fresh, strict=True):
        for token, place in enumerate(places.tolist()):
            pool[place // PAGE, :, place % PAGE] = new[:, token]

    native_attention.append(fresh[0], fresh[1], pools[0], pools[1], places)

    for found, wanted in zip(pools, expected, strict=True):
        assert_same_bits(found, wanted)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_thousands_of_keys_are_summed_as_precisely_as_a_few(dtype: torch.dtype) -> None:
    rows = Rows.of([8191, 3], kv_heads=1, d=64, d_v=64, dtype=dtype)

    assert_close(rows.decode(), reference(rows).float(), dtype)


@needs_compiler
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_too_large_for_exp_choose_the_largest(sign: int) -> None:
    rows = Rows.of([200], d=16, d_v=16)
    rows = replace(rows, query=rows.query * sign * 1e6)

    assert_close(rows.decode(), reference(rows).float())


@needs_compiler
def test_a_row_that_is_not_a_number_is_seen_and_stays_alone() -> None:
    rows = Rows.of([30, 150, 20])
    expected = rows.decode()
    rows.query[:, 1] = torch.nan

    found = rows.decode()

    assert found[1].isnan().all()
    assert_same_bits(found[[0, 2]], expected[[0, 2]])


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        {"lengths": torch.tensor([20, 49])},
        {"lengths": torch.tensor([0, 20])},
        {"tables": torch.tensor([[0, 1], [2, 99]])},
        {"tables": torch.tensor([[0, -1], [2, 3]])},
        {"tables": torch.zeros(1, 2, dtype=torch.int64)},
        {"lengths": torch.tensor([20, 20], dtype=torch.int32)},
        {"key": torch.zeros(2, 1, 32)},
        {"query": torch.zeros(4, 2, 32).mT.contiguous().mT},
        {"values": torch.zeros(6, PAGE, 2, 32).transpose(1, 2)},
    ],
)
def test_what_would_read_memory_of_others_is_refused(change: dict[str, Tensor]) -> None:
    rows = replace(Rows.of([20, 20]), tables=torch.tensor([[0, 1], [2, 3]]))
    rows.decode()
    rows = replace(rows, **change)

    with pytest.raises(AssertionError):
        rows.decode()


@needs_compiler
def test_places_out_of_the_pages_are_refused_and_nothing_is_written() -> None:
    pages, new = torch.zeros(2, 1, PAGE, 4), torch.ones(1, 2, 4)

    for place in (-1, 2 * PAGE):
        with pytest.raises(AssertionError, match="in no page"):
            native_attention.append(new, new, pages, pages, torch.tensor([3, place]))

    assert not pages.any()


@without_kernel
def test_without_a_kernel_nothing_is_supported_and_the_status_says_why(
    tmp_path: Path, changes: dict[str, str], reason: str
) -> None:
    active, detail, supported = said(STATUS, tmp_path, changes)
    assert (active, supported) == (False, False)
    assert reason in detail
