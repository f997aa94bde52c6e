"""What the kernels add, multiply and squash is torch's own bit for bit; what they do not know they leave."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters_store import pointwise
from adapters_store.tape import call
from tests.strategies import light
from tests.tolerances import assert_same_bits
from tests.without_kernel import said, without_kernel

ATEN = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16)
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")
sizes = st.floats(-45, 45)  # powers of two: from nothing to overflow


@needs_compiler
@light
@given(
    st.sampled_from([ATEN.add.Tensor, ATEN.mul.Tensor, ATEN.silu.default]), st.sampled_from(DTYPES),
    st.integers(1, 512), sizes, sizes, st.integers(0, 99),
)  # fmt: skip
def test_numbers_of_any_size_give_torchs_bits(
    operator: Any, dtype: torch.dtype, vectors: int, a_size: float, b_size: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(64 * vectors, generator=generator).mul(2.0**size).to(dtype) for size in (a_size, b_size))
    args = (a,) if operator is ATEN.silu.default else (a, b)
    y = torch.full_like(a, 7)

    found = pointwise.call_of(operator, args, {}, y)

    assert found is not None
    assert call(*found) == 0
    assert_same_bits(y, operator(*args))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_zeros_keep_their_signs(dtype: torch.dtype) -> None:
    a = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -1e-40, 88.8, -88.8, 104.5, -104.5], dtype=dtype)
    a = a.repeat(32)
    y = torch.empty_like(a)

    found = pointwise.call_of(ATEN.silu.default, (a,), {}, y)

    assert found is not None
    call(*found)
    expected = torch.nn.functional.silu(a)
    assert_same_bits(y[~expected.isnan()], expected[~expected.isnan()])
    assert y.isnan().equal(expected.isnan())


X = torch.ones(8, 16)


@pytest.mark.parametrize(
    ("operator", "args", "kwargs", "y"),
    [
        (ATEN.add.Tensor, (X, X), {"alpha": 2}, X),
        (ATEN.add.Tensor, (X, 1.0), {}, X),
        (ATEN.add.Tensor, (X, torch.ones(16)), {}, X),
        (ATEN.add.Tensor, (X, X.double()), {}, X.double()),
        (ATEN.mul.Tensor, (X, torch.ones(16, 8).T), {}, X),
        (ATEN.mul.Tensor, (X.T, X.T), {}, X.T),
        (ATEN.add.Tensor, (X[:, :3], X[:, :3]), {}, X[:, :3].clone()),
        (ATEN.silu.default, (X[0],), {}, X[0].clone()),  # less than a vector
        (ATEN.sub.Tensor, (X, X), {}, X),
        (ATEN.silu.default, (X.double(),), {}, X.double()),
    ],
)  # fmt: skip
def test_whatever_else_stays_torchs(operator: Any, args: Any, kwargs: Any, y: torch.Tensor) -> None:
    assert pointwise.call_of(operator, args, kwargs, y) is None


SCRIPT = "import json; from adapters_store import pointwise; print(json.dumps(len(pointwise._functions())))"


@without_kernel
def test_without_kernel_there_are_none(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    assert said(SCRIPT, tmp_path, changes) == 0
