"""The kernel gives x W^T + b in all shapes; a row never sees its neighbours or the threads; layers come whole."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from adapters_store import linear
from adapters_store.linear import Strips
from tests.strategies import light, randn
from tests.tolerances import assert_same_bits

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
CPUINFO = Path("/proc/cpuinfo")
FLAGS = CPUINFO.read_text().split() if CPUINFO.exists() else []
DTYPES = tuple(
    dtype
    for dtype, flags in ((torch.float32, {"avx512bw", "avx512vl"}), (torch.bfloat16, {"avx512bw", "avx512_bf16"}))
    if HAS_COMPILER and flags <= set(FLAGS)
)
needs_kernel = pytest.mark.skipif(not DTYPES, reason="needs a C compiler and AVX-512")
STATUS = """
import json, torch
from adapters_store import linear
layer, x = torch.nn.Linear(300, 300).requires_grad_(False), torch.randn(3, 300)
status, supported = linear.status(), linear.supports(torch.float32, torch.device("cpu"))
is_laid_out = linear.lay_out(layer, [layer], lambda: linear.forward(layer, x))
equal = torch.equal(linear.forward(layer, x), layer(x))
print(json.dumps([status.active, status.detail, supported, is_laid_out, equal]))
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


class Layered(nn.Module):
    """Two layers as a backbone has them: their forward is the one that knows strips."""

    class Layer(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's name for it
            return linear.forward(self, input)

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = 300) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = self.Layer(width, width), self.Layer(width, width, bias=False)
        self.to(dtype).requires_grad_(False)
        self.x = torch.randn(5, width, dtype=dtype)

    def forward(self) -> Tensor:
        return self.second(self.first(self.x))

    def lay_out(self) -> bool:
        return linear.lay_out(self, [self.first, self.second], self)


def tolerance(dtype: torch.dtype) -> float:
    return 0.05 if dtype == torch.bfloat16 else 1e-4


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_laid_out_gives_the_same_and_has_no_second_copy_of_its_weights(dtype: torch.dtype) -> None:
    model = Layered(dtype)
    expected, bias = model(), model.first.bias

    assert model.lay_out()

    torch.testing.assert_close(model(), expected, atol=tolerance(dtype), rtol=tolerance(dtype))
    assert all(layer.weight.is_meta and layer.weight.shape == (300, 300) for layer in (model.first, model.second))
    assert model.first.weight.dtype == dtype
    assert model.first.bias is bias


@needs_kernel
def test_weights_are_put_back_bit_for_bit() -> None:
    model = Layered()
    weight = model.first.weight.clone()
    model.lay_out()

    linear.put_back(model.first)
    linear.put_back(model.first)  # twice is once

    assert_same_bits(model.first.weight, weight)
    assert not model.first.weight.requires_grad


@needs_kernel
def test_a_weight_that_another_module_reads_too_stays() -> None:
    model = Layered()
    table = nn.Embedding(300, 300)
    table.weight = model.first.weight
    model.table = table
    expected = model()

    assert model.lay_out()

    assert not table.weight.is_meta
    assert model.first.weight is table.weight
    assert model.second.weight.is_meta
    torch.testing.assert_close(model(), expected)


@needs_kernel
@pytest.mark.parametrize("wrong", ["raises", "differs"])
def test_nothing_is_laid_out_where_the_model_would_not_give_the_same(wrong: str) -> None:
    model = Layered()
    expected = model()

    def run() -> Tensor:  # a model that reads a weight past its layer's forward
        if not model.first.weight.is_meta:
            return model()
        return model.x @ model.first.weight.mT + model.x.mean() if wrong == "raises" else 2 * model()

    assert not linear.lay_out(model, [model.first, model.second], run)

    assert not model.first.weight.is_meta
    assert_same_bits(model(), expected)


@needs_kernel
def test_small_layers_other_dtypes_and_what_is_trained_stay_as_they_are() -> None:
    trained = Layered().requires_grad_(True)

    for model in (Layered(width=32), Layered(torch.float64), trained):
        assert not model.lay_out()
        assert not model.first.weight.is_meta


@needs_kernel
def test_gradients_to_x_and_what_the_kernel_cannot_take_are_torchs() -> None:
    model = Layered()
    before = model.first.weight.clone()
    model.lay_out()
    x = model.x.clone().requires_grad_()

    model.first(x).sum().backward()

    torch.testing.assert_close(x.grad, before.sum(0).expand(5, 300), atol=1e-4, rtol=1e-4)
    assert model.first(torch.empty(2, 0, 300)).shape == (2, 0, 300)
    model.first.bias = nn.Parameter(torch.randn(600)[::2], requires_grad=False)
    torch.testing.assert_close(model.first(model.x), F.linear(model.x, before, model.first.bias))
    with pytest.raises(RuntimeError):
        model.first(model.x.double())
    with pytest.raises(RuntimeError):
        model.first(model.x[:, :150])


def test_layers_as_loaded_keep_their_gradients() -> None:
    for part in ("x", "weight", "bias"):
        layer, x = nn.Linear(300, 300).requires_grad_(False), torch.randn(120, 300)
        wanted = x if part == "x" else getattr(layer, part)
        wanted.requires_grad_()

        linear.forward(layer, x).sum().backward()

        assert wanted.grad is not None
        assert wanted.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "reason"), [({"ESPALIER_NATIVE": "0"}, "ESPALIER_NATIVE=0"), ({"PATH": ""}, "no C compiler")]
)
def test_without_a_kernel_torch_serves_and_the_status_says_why(
    tmp_path: Path, changes: dict[str, str], reason: str
) -> None:
    environment = os.environ | {"ESPALIER_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)} | changes
    environment.pop("CC", None)

    answer = subprocess.run(
        [sys.executable, "-c", STATUS], env=environment, capture_output=True, text=True, timeout=120
    )

    assert answer.returncode == 0, answer.stderr
    active, detail, supported, is_laid_out, equal = json.loads(answer.stdout.splitlines()[-1])
    assert (active, supported, is_laid_out, equal) == (False, False, False, True)
    assert reason in detail


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(300, 512), (1, 300, 512), (2, 3, 50, 512)])
def test_layers_as_loaded_are_torchs_whichever_library_multiplies(shape: tuple[int, ...], has_bias: bool) -> None:
    layer, x = torch.nn.Linear(512, 640, bias=has_bias), torch.randn(shape)

    with torch.no_grad():
        found = linear.forward(layer, x)
        strided = linear.forward(layer, torch.randn(300, 1024)[:, ::2])

    assert torch.allclose(found, layer(x), atol=1e-4)
    assert found.shape == (*shape[:-1], 640)
    assert strided.shape == (300, 640)
    assert linear.forward(layer, x.requires_grad_()).requires_grad
