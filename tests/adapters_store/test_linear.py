"""The kernel gives x W^T + b in all shapes; a row never sees its neighbours or the threads."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from adapters_store import linear
from adapters_store.linear import Strips
from tests.adapters_store.native_linear import DTYPES, needs_kernel
from tests.strategies import light, randn
from tests.tolerances import assert_same_bits
from tests.without_kernel import said, without_kernel

CPU = torch.device("cpu")
STATUS = """
import json, torch
from adapters_store import linear
from adapters_store.linear_layers import forward, lay_out
layer, x = torch.nn.Linear(300, 300).requires_grad_(False), torch.randn(3, 300)
status, supported = linear.status(), linear.supports(torch.float32, torch.device("cpu"))
is_laid_out = lay_out(layer, [layer], lambda: forward(layer, x))
close = torch.allclose(forward(layer, x), layer(x), atol=1e-6)
print(json.dumps([status.active, status.detail, supported, is_laid_out, close]))
"""


@dataclass(frozen=True)
class Case:
    """A layer and its x: (rows, d_in), whose rows may be parts of longer ones; behind each there is NaN."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(
        rows: int, d_in: int, d_out: int, dtype: torch.dtype, gap: int = 0, with_bias: bool = True, seed: int = 0
    ) -> "Case":
        generator = torch.Generator().manual_seed(seed)
        room = torch.full((rows, d_in + gap), torch.nan)
        room[:, :d_in] = randn(generator, rows, d_in)
        weight = torch.full((d_out + 1, d_in), torch.nan)
        weight[:d_out] = randn(generator, d_out, d_in)
        bias = randn(generator, d_out).to(dtype) if with_bias else None
        return Case(room.to(dtype)[:, :d_in], weight.to(dtype)[:d_out], bias)

    @property
    def strips(self) -> Strips:
        return Strips.of(self.weight)

    def linear(self) -> Tensor:
        return linear.linear(self.x, self.strips, self.bias)

    def exact(self) -> Tensor:
        return F.linear(self.x.double(), self.weight.double(), None if self.bias is None else self.bias.double())


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    widths = st.integers(1, 100) | st.integers(200, 1200) | st.sampled_from([32, 64, 256, 512, 768, 1024, 2048, 2752])
    return Case.of(
        draw(st.integers(1, 40) | st.sampled_from([95, 96, 97, 200])),
        draw(widths),
        draw(st.integers(1, 100)),
        draw(st.sampled_from(DTYPES)),
        gap=draw(st.sampled_from([0, 1, 7, 64])),
        with_bias=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@needs_kernel
def test_the_kernel_serves_here() -> None:
    assert linear.status().active, linear.status().detail
    assert all(linear.supports(dtype, CPU) for dtype in DTYPES)
    assert not linear.supports(torch.float16, CPU)
    assert not linear.supports(torch.float32, torch.device("cuda"))


@needs_kernel
@settings(light, max_examples=200)
@given(any_case())
def test_it_is_the_product_with_the_bias_added(case: Case) -> None:
    found, expected = case.linear(), case.exact()

    assert found.dtype == case.x.dtype
    sizes = F.linear(case.x.double().abs(), case.weight.double().abs()) + 1
    half_a_unit = 2.0**-8 if found.dtype == torch.bfloat16 else 0.0
    assert ((found.double() - expected).abs() <= half_a_unit * 1.01 * expected.abs() + 1e-5 * sizes).all()


@needs_kernel
@light
@given(any_case())
def test_a_row_is_the_same_bit_for_bit_alone(case: Case) -> None:
    strips = case.strips

    alone = [linear.linear(row[None], strips, case.bias) for row in case.x]

    assert_same_bits(torch.cat(alone), case.linear())


@needs_kernel
@light
@given(any_case(), st.integers(1, 64))
def test_threads_change_no_bit(two_threads: None, case: Case, times: int) -> None:
    many = Case(case.x, case.weight.repeat(times, 1), None if case.bias is None else case.bias.repeat(times))
    on_two = [case.linear(), many.linear()]

    torch.set_num_threads(1)
    on_one = [case.linear(), many.linear()]

    torch.set_num_threads(2)
    for found, expected in zip(on_two, on_one, strict=True):
        assert_same_bits(found, expected)


@needs_kernel
def test_a_row_that_is_not_a_number_is_seen_and_stays_alone() -> None:
    case = Case.of(9, 300, 40, torch.float32)
    expected = case.linear()
    case.x[4] = torch.nan

    found = case.linear()

    assert found[4].isnan().all()
    others = [row for row in range(9) if row != 4]
    assert_same_bits(found[others], expected[others])


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_x_may_have_any_strides_and_dimensions(dtype: torch.dtype) -> None:
    case = Case.of(6, 48, 20, dtype)
    expected = case.linear()

    for x in (case.x.mT.contiguous().mT, case.x[None], case.x.flip(0).flip(0)[:, None]):
        found = linear.linear(x, case.strips, case.bias)

        assert found.shape == (*x.shape[:-1], 20)
        assert_same_bits(found.view(6, 20), expected)
    swapped = linear.linear(case.x.view(2, 3, 48).transpose(0, 1), case.strips, case.bias)  # (3, 2, 20)
    assert_same_bits(swapped.transpose(0, 1).reshape(6, 20), expected)
    assert_same_bits(linear.linear(case.x[0], case.strips, case.bias), expected[0])


@light
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([torch.float32, torch.bfloat16]))
def test_strips_hold_a_weight_bit_for_bit(d_out: int, d_in: int, dtype: torch.dtype) -> None:
    weight = randn(torch.Generator().manual_seed(d_out), d_out, d_in).to(dtype)

    strips = Strips.of(weight)

    assert strips.words.shape[0] * linear.STRIP - linear.STRIP < d_out
    assert_same_bits(strips.weight(), weight)


@without_kernel
def test_without_a_kernel_torch_serves_and_the_status_says_why(
    tmp_path: Path, changes: dict[str, str], reason: str
) -> None:
    active, detail, supported, is_laid_out, close = said(STATUS, tmp_path, changes)
    assert (active, supported, is_laid_out, close) == (False, False, False, True)
    assert reason in detail
