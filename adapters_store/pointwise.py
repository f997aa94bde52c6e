"""Builds, checks and calls pointwise.c: for tapes, what a layer does number by number.

A tape that had to go back to torch for every residual would spend more time there than on the numbers. Only functions
that give torch's bits serve. ESPALIER_NATIVE=0 switches them off.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters_store import compiled

_SOURCE, _INCLUDED = (Path(__file__).with_name(name) for name in ("pointwise.c", "wide.h"))
_FLAGS = (*compiled.FLAGS, "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")  # pointwise.c says why
_NAMES = {torch.ops.aten.add.Tensor: "add", torch.ops.aten.mul.Tensor: "mul", torch.ops.aten.silu.default: "silu"}
_VECTOR = 64  # numbers that torch computes at once, at most
_KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Call(ctypes.Structure):
    """The C struct `call`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "y")),
        *((name, ctypes.c_int64) for name in ("n", "num_threads")),
    ]


def call_of(operator: object, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> tuple[Any, Call] | None:
    """The function and its arguments that fill y as an operator of torch would; None where there is none.

    Tensors must have y's shape, dtype and order, without gaps, and whole vectors: torch's last few have other bits.
    """
    function = _functions().get((operator, y.dtype))
    is_dense = y.is_contiguous() and y.numel() % _VECTOR == 0 and all(_is_like(part, y) for part in args)
    if function is None or kwargs or not is_dense:
        return None
    a, b = args if len(args) == 2 else (args[0], None)
    addresses = a.data_ptr(), None if b is None else b.data_ptr(), y.data_ptr()
    return function, Call(*addresses, y.numel(), torch.get_num_threads())


def _is_like(part: Any, y: Tensor) -> bool:
    return (
        isinstance(part, Tensor)
        and part.is_cpu
        and part.dtype == y.dtype
        and part.stride() == y.stride()
        and part.shape == y.shape
    )


@functools.cache
def _functions() -> dict[tuple[object, torch.dtype], Any]:
    """The functions by torch's operator and dtype; built at the first call."""
    try:
        library = ctypes.CDLL(str(compiled.build("pointwise", [_SOURCE], _FLAGS, included=[_INCLUDED])))
    except compiled.FAILURES:
        return {}
    found: dict[tuple[object, torch.dtype], Any] = {}
    for operator, name in _NAMES.items():
        for dtype, kind in _KINDS.items():
            function = getattr(library, f"{name}_{kind}")
            function.restype = ctypes.c_int64
            if _agrees(operator, function, dtype):
                found[operator, dtype] = function
    return found


def _agrees(operator: Any, function: Any, dtype: torch.dtype) -> bool:
    """Torch's bits, for numbers of all sizes."""
    kind = torch.int16 if dtype == torch.bfloat16 else torch.int32
    least = torch.iinfo(kind).min
    a = torch.arange(least, -least, -least // 20000, dtype=torch.int64).to(kind).view(dtype)
    args = (a,) if operator is torch.ops.aten.silu.default else (a, a.flip(0))
    expected = operator(*args)
    y = torch.empty_like(expected)
    addresses = [part.data_ptr() for part in args]
    function(ctypes.byref(Call(addresses[0], addresses[-1], y.data_ptr(), len(y), 1)))
    return bool(((y == expected) | (y.isnan() & expected.isnan())).all())
