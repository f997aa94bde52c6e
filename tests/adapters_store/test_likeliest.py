"""The screened token is the one that the logits give, whatever rows and weights are, and says where there is none."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters_store import likeliest, linear
from adapters_store.likeliest import Screen
from adapters_store.linear import Strips
from tests.adapters_store.native_linear import DTYPES, needs_kernel, needs_screen
from tests.strategies import light, randn
from tests.tolerances import assert_same_bits
from tests.without_kernel import said, without_kernel

CPU = torch.device("cpu")
STATUS = """
import json, torch
from adapters_store import likeliest
status, supported = likeliest.status(), likeliest.supports(torch.float32, torch.device("cpu"))
print(json.dumps([status.active, status.detail, supported]))
"""


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeliest, "_MIN_WEIGHTS", 0)


def screen_of(weight: Tensor) -> Screen:
    found = Screen.of(Strips.of(weight))
    assert found is not None
    return found


def by_logits(x: Tensor, screen: Screen) -> Tensor:
    logits = linear.linear(x, screen.strips).float()
    best = torch.from_numpy(logits.numpy().argmax(1))
    return torch.where(logits.amax(1).isfinite(), best, -1)


@st.composite
def any_case(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rows and weights of any sizes; outputs that are equal, or nearly; inputs that outweigh the others."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype, d_in, d_out = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 300)), draw(st.integers(1, 200))
    x, weight = randn(generator, draw(st.integers(1, 40)), d_in), randn(generator, d_out, d_in)
    for _ in range(draw(st.integers(0, 3))):
        like, at = draw(st.integers(0, d_out - 1)), draw(st.integers(0, d_out - 1))
        weight[at] = weight[like] * (1 + draw(st.sampled_from([0, 2.0**-20, -(2.0**-8), 1])))
    weight[:, draw(st.integers(0, d_in - 1))] *= draw(st.sampled_from([1.0, 1e-3, 1e4]))
    x[:, draw(st.integers(0, d_in - 1))] *= draw(st.sampled_from([0.0, 1.0, 1e4, torch.inf, torch.nan]))
    powers = st.sampled_from([0.0, 1e-42, 1e-36, 1e-20, 1.0, 1e20, 3e37])
    return (x * draw(powers)).to(dtype), (weight * draw(powers)).clamp(-3e38, 3e38).to(dtype)


@needs_screen
@settings(light, max_examples=400)
@given(any_case())
def test_it_is_the_token_that_the_logits_give(case: tuple[Tensor, Tensor]) -> None:
    x, weight = case
    screen = Screen.of(Strips.of(weight))
    if screen is None:
        assert not weight.float().norm(dim=1).isfinite().all()
    else:
        assert_same_bits(screen.likeliest(x), by_logits(x, screen))


@needs_screen
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 13, 95, 96, 97, 200])
def test_rows_of_a_real_size_compute_few_logits(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, screen = randn(generator, rows, 640).to(dtype), screen_of(randn(generator, 5003, 640).to(dtype))

    assert_same_bits(screen.likeliest(x), by_logits(x, screen))

    computed, seen = screen.counts.tolist()
    assert seen == rows * 313
    assert rows <= computed < 0.05 * seen


@needs_screen
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_outweighs_its_output_hides_nothing(dtype: torch.dtype) -> None:
    """In 8 bits all other weights of output 70 are 0, and yet its product is the largest."""
    weight = 0.1 * torch.eye(90, 64)
    weight[70] = 0.3
    weight[70, 5] = 127
    x = torch.ones(1, 64)
    x[0, 5] = 0

    screen = screen_of(weight.to(dtype))

    assert int(screen.bounds.q[2, :, 6].count_nonzero()) == 1
    assert screen.likeliest(x.to(dtype)).tolist() == [70]


def far_apart(low: list[float], high: list[float]) -> Tensor:
    """Weights of two outputs in different vectors, the others far below."""
    weight = torch.full((40, len(low)), -1.0)
    weight[3], weight[20] = torch.tensor(low), torch.tensor(high)
    return weight


@needs_screen
def test_bounds_are_as_wide_as_8_bits_may_lose() -> None:
    """Output 3 loses 0.49 at each of 63 inputs, all in the direction of x; output 20, nothing, is ahead of the rest."""
    low = [127.0] + [10.49] * 63
    weight = far_apart(low, [127.0] + [10.0] * 43 + [11.0] * 20)

    assert screen_of(weight).likeliest(torch.ones(1, 64)).tolist() == [3]


@needs_screen
def test_bounds_are_as_wide_as_16_bits_may_lose() -> None:
    """Beside 32767 a 0.4 is nothing, and decides."""
    weight = far_apart([1.0, 1.0], [1.0, 0.6])

    assert screen_of(weight).likeliest(torch.tensor([[32767.0, 0.4]])).tolist() == [3]


@needs_screen
@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="needs AVX512-BF16")
def test_logits_that_are_equal_once_rounded_are_equal() -> None:
    """255.5 and 257 are 256 in bfloat16."""
    weight = far_apart([127.0, 1.0], [127.0, 2.0]).bfloat16()

    assert screen_of(weight).likeliest(torch.tensor([[2.0, 1.5]]).bfloat16()).tolist() == [3]


@needs_screen
def test_a_sum_that_overflows_spoils_its_row() -> None:
    weight = torch.tensor([[2.0, -2.0], [1e-38, 0.0]])

    assert screen_of(weight).likeliest(torch.full((1, 2), 3e38)).tolist() == [-1]


@needs_screen
def test_the_first_of_equals_is_taken_wherever_it_stands() -> None:
    weight = -torch.ones(100, 32)
    weight[[9, 40, 99]] = 1.0
    screen = screen_of(weight)

    assert screen.likeliest(torch.ones(3, 32)).tolist() == [9] * 3
    assert screen.likeliest(torch.zeros(1, 32)).tolist() == [0]


@needs_screen
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_has_no_token_and_its_neighbours_do(odd: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, screen = randn(generator, 5, 48), screen_of(randn(generator, 70, 48))
    expected = by_logits(x, screen)
    x[2, 3], expected[2] = odd, -1

    assert_same_bits(screen.likeliest(x), expected)


@needs_screen
@light
@given(st.integers(1, 40), st.sampled_from(DTYPES))
def test_threads_and_strides_change_nothing(two_threads: None, rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, screen = randn(generator, rows, 101).to(dtype), screen_of(randn(generator, 4099, 101).to(dtype))
    on_two = screen.likeliest(x)

    torch.set_num_threads(1)
    on_one, turned = screen.likeliest(x), screen.likeliest(x.mT.contiguous().mT)
    apart = screen.likeliest(torch.cat([x, x], dim=1)[:, :101])

    torch.set_num_threads(2)
    for found in (on_one, turned, apart):
        assert_same_bits(found, on_two)


@needs_screen
def test_bounds_that_exclude_little_are_given_up() -> None:
    screen = screen_of(torch.ones(2048, 32))
    x = torch.ones(256, 32)
    while screen.counts[1] <= likeliest._TRIED:
        assert screen.pays(256)
        assert screen.likeliest(x).tolist() == [0] * 256

    assert screen.is_given_up
    assert not screen.pays(1)


@needs_kernel
def test_there_is_no_screen_for_few_weights_or_many_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    strips = Strips.of(torch.ones(64, 64))
    monkeypatch.setattr(likeliest, "_MIN_WEIGHTS", 64 * 64 + 1)
    assert Screen.of(strips) is None
    monkeypatch.setattr(likeliest, "_MIN_WEIGHTS", 0)
    monkeypatch.setattr(likeliest, "_MOST_INPUTS", 63)
    assert Screen.of(strips) is None


@needs_screen
def test_in_bfloat16_many_rows_get_all_their_logits() -> None:
    if torch.bfloat16 in DTYPES:
        screen = screen_of(torch.ones(64, 64, dtype=torch.bfloat16))
        assert [screen.pays(rows) for rows in (0, 1, 8, 9)] == [False, True, True, False]
    assert screen_of(torch.ones(64, 64)).pays(500)


@without_kernel
def test_without_a_kernel_all_logits_are_computed_and_the_status_says_why(
    tmp_path: Path, changes: dict[str, str], reason: str
) -> None:
    active, detail, supported = said(STATUS, tmp_path, changes)
    assert (active, supported) == (False, False)
    assert detail.startswith("from all logits: ")
    assert reason in detail
