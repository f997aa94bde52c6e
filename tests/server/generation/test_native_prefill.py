"""Chunks of prompts through the C kernel: plain causal attention in all shapes, the same bits however they are cut."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapters_store.packing import Scoring
from server.generation import native_attention
from server.generation.attention import attend_chunk, gathered
from server.generation.pages import PAGE, pages_for
from tests.bench.attention import Shape, measured
from tests.server.generation.test_native_attention import DTYPES, SHAPES, needs_compiler
from tests.strategies import light, randn
from tests.tolerances import assert_close, assert_same_bits

pytestmark = needs_compiler


@dataclass(frozen=True)
class Prompt:
    """One sequence in pages, in any order; what was never written is NaN. The last tokens have queries."""

    query: Tensor  # (heads, count, d)
    keys: Tensor  # (pages, kv_heads, PAGE, d)
    values: Tensor
    table: Tensor
    length: int
    scoring: Scoring

    @staticmethod
    def of(
        length: int, count: int, kv_heads: int = 2, group: int = 2, d: int = 32, d_v: int = 32,
        dtype: torch.dtype = torch.float32, window: int | None = None, softcap: float | None = None, seed: int = 0,
    ) -> "Prompt":  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        num_pages = pages_for(length) + 2
        table = torch.randperm(num_pages, generator=generator)[:-1]
        places = torch.stack([table[t // PAGE] * PAGE + t % PAGE for t in range(length)])
        pools = []
        for width in (d, d_v):
            pool = torch.full((num_pages, kv_heads, PAGE, width), torch.nan, dtype=dtype)
            pool[places // PAGE, :, places % PAGE] = randn(generator, length, kv_heads, width).to(dtype)
            pools.append(pool)
        query = randn(generator, 1, count, kv_heads * group * d).to(dtype).view(count, kv_heads * group, d)
        scoring = Scoring(0.3, is_causal=True, window=window, softcap=softcap)
        return Prompt(query.transpose(0, 1), pools[0], pools[1], table, length, scoring)

    def prefill(self) -> Tensor:
        return native_attention.prefill(self.query, self.keys, self.values, self.table, self.length, self.scoring)

    def chunk(self, begin: int, end: int) -> "Prompt":
        """Queries begin to end, as if the sequence ended there."""
        length = self.length - self.query.shape[1] + end
        return replace(self, query=self.query[:, begin:end], length=length)

    def expected(self) -> Tensor:
        """(count, heads, d_v) in float64, by the form that torch serves."""
        key, value = (gathered(part, self.table)[:, : self.length].double() for part in (self.keys, self.values))
        return attend_chunk(self.query.double(), key, value, self.scoring).transpose(0, 1)


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    count = draw(st.integers(1, 40) | st.integers(100, 150))
    past = draw(st.just(0) | st.integers(1, 50) | st.integers(120, 300))
    return Prompt.of(past + count, count, **draw(SHAPES))


@light
@given(prompts())
def test_a_chunk_is_causal_attention_over_its_sequence(prompt: Prompt) -> None:
    found = prompt.prefill()

    assert found.dtype == prompt.query.dtype
    assert_close(found, prompt.expected().float(), found.dtype)


@light
@given(prompts(), st.data())
def test_however_a_prompt_is_cut_its_tokens_are_the_same_bit_for_bit(prompt: Prompt, data: st.DataObject) -> None:
    whole, count = prompt.prefill(), prompt.query.shape[1]
    cut = data.draw(st.integers(0, count))

    parts = [prompt.chunk(begin, end).prefill() for begin, end in ((0, cut), (cut, count)) if begin < end]

    assert_same_bits(torch.cat(parts), whole)


@light
@given(prompts(), st.integers(1, 9))
def test_threads_change_no_bit(two_threads: None, prompt: Prompt, threads: int) -> None:
    torch.set_num_threads(threads)
    on_many = prompt.prefill()

    torch.set_num_threads(1)

    assert_same_bits(on_many, prompt.prefill())


@pytest.mark.parametrize("dtype", DTYPES)
def test_thousands_of_keys_are_summed_as_precisely_as_a_few(dtype: torch.dtype) -> None:
    prompt = Prompt.of(6000, 3, kv_heads=1, d=64, d_v=64, dtype=dtype)

    assert_close(prompt.prefill(), prompt.expected().float(), dtype)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_too_large_for_exp_choose_the_largest(sign: int) -> None:
    prompt = Prompt.of(200, 200, d=16, d_v=16)
    prompt = replace(prompt, query=prompt.query * sign * 1e6)

    assert_close(prompt.prefill(), prompt.expected().float())


def test_a_token_that_is_not_a_number_is_seen_and_stays_alone() -> None:
    prompt = Prompt.of(90, 60)
    expected, others = prompt.prefill(), torch.arange(60) != 31
    prompt.query[:, 31] = torch.nan

    found = prompt.prefill()

    assert found[31].isnan().all()
    assert_same_bits(found[others], expected[others])


@pytest.mark.parametrize(
    "change",
    [
        {"length": 33},
        {"length": 3},
        {"length": 0},
        {"table": torch.tensor([0, 99])},
        {"table": torch.tensor([-1, 0])},
        {"table": torch.tensor([[0, 1]])},
        {"table": torch.tensor([0, 1], dtype=torch.int32)},
        {"query": torch.zeros(4, 20, 32).mT.contiguous().mT},
        {"query": torch.zeros(4, 20, 31)},
        {"values": torch.zeros(6, PAGE, 2, 32).transpose(1, 2)},
    ],
)
def test_what_would_read_memory_of_others_is_refused(change: dict[str, object]) -> None:
    prompt = replace(Prompt.of(20, 20), table=torch.tensor([0, 1]))
    prompt.prefill()

    with pytest.raises((AssertionError, ValueError)):
        replace(prompt, **change).prefill()  # type: ignore[arg-type]


def test_the_benchmark_measures_both_ways() -> None:
    line = measured(Shape("bfloat16", heads=4, kv_heads=2, d=16, past=20, count=30), rounds=3)

    assert line["speedup"] == pytest.approx(line["torch"][0] / line["native"][0], abs=0.01)
