"""The kernel gives x W^T + b in all shapes; a row never sees its neighbours or the threads; gradients stay torch's."""

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

from adapters_store import few_rows
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
from adapters_store import few_rows
layer, x = torch.nn.Linear(300, 300), torch.randn(3, 300)
status, supported = few_rows.status(), few_rows.supports(torch.float32, torch.device("cpu"))
with torch.no_grad():
    equal = torch.equal(few_rows.forward(layer, x), layer(x))
print(json.dumps([status.active, status.detail, supported, equal]))
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

    def linear(self) -> Tensor:
        return few_rows.linear(self.x, self.weight, self.bias)

    def exact(self) -> Tensor:
        return F.linear(self.x.double(), self.weight.double(), None if self.bias is None else self.bias.double())


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    widths = st.integers(1, 100) | st.integers(200, 1200) | st.sampled_from([32, 64, 256, 512, 768, 1024, 2048, 2752])
    return Case.of(
        draw(st.integers(1, 40)),
        draw(widths),
        draw(st.integers(1, 70)),
        draw(st.sampled_from(DTYPES)),
        gap=draw(st.sampled_from([0, 1, 7, 64])),
        with_bias=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@needs_kernel
def test_the_kernel_serves_here() -> None:
    assert few_rows.status().active, few_rows.status().detail
    assert all(few_rows.supports(dtype, CPU) for dtype in DTYPES)
    assert not few_rows.supports(torch.float16, CPU)
    assert not few_rows.supports(torch.float32, torch.device("cuda"))


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
    alone = [few_rows.linear(row[None], case.weight, case.bias) for row in case.x]

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
        found = few_rows.linear(x, case.weight, case.bias)

        assert found.shape == (*x.shape[:-1], 20)
        assert_same_bits(found.view(6, 20), expected)
    swapped = few_rows.linear(case.x.view(2, 3, 48).transpose(0, 1), case.weight, case.bias)  # (3, 2, 20)
    assert_same_bits(swapped.transpose(0, 1).reshape(6, 20), expected)
    assert_same_bits(few_rows.linear(case.x[0], case.weight, case.bias), expected[0])


class Calls:
    """Counts what reaches the kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        linear = few_rows.linear

        def counting(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            self.count += 1
            return linear(x, weight, bias)

        monkeypatch.setattr(few_rows, "linear", counting)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@needs_kernel
def test_forward_takes_the_kernel_for_few_rows_and_torch_for_many(calls: Calls) -> None:
    layer = nn.Linear(300, 300).requires_grad_(False)

    for rows, expected in ((1, 1), (few_rows.MAX_ROWS, 2), (few_rows.MAX_ROWS + 1, 2), (0, 2)):
        x = torch.randn(1, rows, 300)
        torch.testing.assert_close(few_rows.forward(layer, input=x), layer(x))
        assert calls.count == expected


def test_it_pays_for_few_rows_of_large_weights() -> None:
    assert few_rows.pays(1, 512, 512)
    assert few_rows.pays(few_rows.MAX_ROWS, 4096, 4096)
    assert not few_rows.pays(few_rows.MAX_ROWS + 1, 512, 512)
    assert not few_rows.pays(0, 512, 512)
    assert not few_rows.pays(1, 32, 32)


@needs_kernel
@pytest.mark.parametrize("part", ["x", "weight", "bias"])
def test_gradients_are_never_lost(calls: Calls, part: str) -> None:
    layer, x = nn.Linear(300, 300).requires_grad_(False), torch.randn(3, 300)
    wanted = x if part == "x" else getattr(layer, part)
    wanted.requires_grad_()

    few_rows.forward(layer, x).sum().backward()

    assert wanted.grad is not None
    assert wanted.grad.abs().sum() > 0
    assert calls.count == 0
    with torch.no_grad():
        few_rows.forward(layer, x)
    assert calls.count == 1


@needs_kernel
def test_weights_that_move_are_found(calls: Calls) -> None:
    layer, x = nn.Linear(300, 300).requires_grad_(False), torch.randn(3, 300)

    few_rows.forward(layer, x)
    layer.to(torch.float64).to(torch.float32)
    layer.weight.data = torch.randn(300, 300)

    torch.testing.assert_close(few_rows.forward(layer, x), layer(x))
    assert calls.count == 2


@needs_kernel
def test_what_the_kernel_cannot_take_is_torchs(calls: Calls) -> None:
    layer, x = nn.Linear(300, 300).requires_grad_(False), torch.randn(3, 300)
    turned = nn.Linear(300, 300).requires_grad_(False)
    turned.weight.data = turned.weight.mT
    strided = nn.Linear(300, 300).requires_grad_(False)
    strided.bias.data = torch.randn(600)[::2]

    torch.testing.assert_close(few_rows.forward(strided, x), strided(x))
    torch.testing.assert_close(few_rows.forward(turned, x), turned(x))
    torch.testing.assert_close(few_rows.forward(layer.double(), x.double()), layer(x.double()))
    with pytest.raises(RuntimeError):
        few_rows.forward(layer, x)
    with pytest.raises(RuntimeError):
        few_rows.forward(layer.float(), x[:, :150])
    assert calls.count == 0


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
    active, detail, supported, equal = json.loads(answer.stdout.splitlines()[-1])
    assert (active, supported, equal) == (False, False, True)
    assert reason in detail


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(300, 512), (1, 300, 512), (2, 3, 50, 512)])
def test_many_rows_are_torchs_whichever_library_multiplies(shape: tuple[int, ...], has_bias: bool) -> None:
    layer, x = torch.nn.Linear(512, 640, bias=has_bias), torch.randn(shape)

    with torch.no_grad():
        found = few_rows.forward(layer, x)
        strided = few_rows.forward(layer, torch.randn(300, 1024)[:, ::2])

    assert torch.allclose(found, layer(x), atol=1e-4)
    assert found.shape == (*shape[:-1], 640)
    assert strided.shape == (300, 640)
    assert few_rows.forward(layer, x.requires_grad_()).requires_grad
