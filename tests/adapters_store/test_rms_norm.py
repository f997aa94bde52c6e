"""The kernel gives what model libraries' RMSNorms give; a row never sees its neighbours; other norms keep their own."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from adapters_store import rms_norm
from adapters_store.sites import Sites
from tests.strategies import light, randn
from tests.tolerances import assert_same_bits

HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")
DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-6


def norm_of(d: int, dtype: torch.dtype, seed: int = 0) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(d, EPS).to(dtype).requires_grad_(False)
    norm.weight.data = randn(torch.Generator().manual_seed(seed), d).to(dtype)
    return norm


@st.composite
def any_case(draw: st.DrawFn) -> tuple[Tensor, LlamaRMSNorm]:
    rows, d, seed = draw(st.integers(1, 9)), draw(st.integers(1, 200) | st.just(1024)), draw(st.integers(0, 1000))
    dtype, size = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1e-4, 1.0, 300.0]))
    return (size * randn(torch.Generator().manual_seed(seed), rows, d)).to(dtype), norm_of(d, dtype, seed)


@needs_compiler
@light
@given(any_case())
def test_it_is_the_norm_of_model_libraries(case: tuple[Tensor, LlamaRMSNorm]) -> None:
    x, norm = case
    found, expected = rms_norm.rms_norm(x, norm.weight, EPS), norm(x)

    assert found.dtype == x.dtype
    wide = x.double()
    exact = norm.weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    half_a_unit = 2.0**-8 if x.dtype == torch.bfloat16 else 1e-6  # of x hat, and of the product
    for one in (found, expected):
        assert ((one.double() - exact).abs() <= 2.02 * half_a_unit * exact.abs()).all()


@needs_compiler
@light
@given(any_case())
def test_a_row_is_the_same_bit_for_bit_alone(case: tuple[Tensor, LlamaRMSNorm]) -> None:
    x, norm = case

    alone = [rms_norm.rms_norm(row[None], norm.weight, EPS) for row in x]

    assert_same_bits(torch.cat(alone), rms_norm.rms_norm(x, norm.weight, EPS))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(two_threads: None, dtype: torch.dtype) -> None:
    x, norm = torch.randn(1, 300, 96).to(dtype), norm_of(96, dtype)
    on_two = rms_norm.rms_norm(x, norm.weight, EPS)

    torch.set_num_threads(1)

    assert_same_bits(rms_norm.rms_norm(x, norm.weight, EPS), on_two)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_a_number_is_seen_and_stays_alone(dtype: torch.dtype) -> None:
    x, norm = torch.randn(3, 50).to(dtype), norm_of(50, dtype)
    expected = rms_norm.rms_norm(x, norm.weight, EPS)
    x[1, 7] = torch.nan

    found = rms_norm.rms_norm(x, norm.weight, EPS)

    assert found[1].isnan().all()
    assert_same_bits(found[[0, 2]], expected[[0, 2]])


@needs_compiler
def test_it_serves_norms_that_compute_the_same_and_no_others() -> None:
    other = GemmaRMSNorm(256)  # adds one to the weight
    other.weight.data.uniform_(0.1, 0.5)

    assert rms_norm.status().active, rms_norm.status().detail
    assert rms_norm.serves(norm_of(256, torch.float32))
    assert rms_norm.serves(norm_of(256, torch.bfloat16))
    assert not rms_norm.serves(other)
    assert not rms_norm.serves(nn.LayerNorm(256))
    assert not rms_norm.serves(norm_of(256, torch.float16))
    assert not rms_norm.serves(norm_of(64, torch.float32))  # too short to matter


class Block(nn.Module):
    """Some norms."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.other = norm_of(256, torch.float32), GemmaRMSNorm(256).requires_grad_(False)
        self.other.weight.data.uniform_(0.1, 0.5)


@needs_compiler
def test_attached_norms_go_through_it_and_gradients_stay_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, calls = Block(), torch.randn(1, 5, 256), []
    expected = [block.same(x), block.other(x)]
    kernel = rms_norm.rms_norm
    monkeypatch.setattr(rms_norm, "rms_norm", lambda *given: calls.append(given) or kernel(*given))  # type: ignore[func-returns-value]
    sites = Sites(block, 256)
    calls.clear()

    found = [block.same(hidden_states=x), block.other(x), block.same(x.mT.contiguous().mT)]

    for one, wanted in zip(found, [*expected, expected[0]], strict=True):
        torch.testing.assert_close(one, wanted)
    assert len(calls) == 2
    block.same(x.clone().requires_grad_()).sum().backward()
    assert len(calls) == 2
    sites.detach()
    assert type(block.same) is LlamaRMSNorm
