"""Builds, checks and calls rms_norm.c: RMSNorm in one call instead of six, on the CPU.

`forward` stands in for the forward of a norm that `serves` found to be the same: model libraries have a class per
family, and some of them add one to the weight or round in another place, so a norm is tried and not looked up by name.
Without a compiler, on a GPU, or where gradients are wanted, the module's own forward serves. ESPALIER_NATIVE=0 switches
the kernel off.
"""

import ctypes
import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters_store import compiled, tape
from adapters_store.compiled import Status

_SOURCE, _INCLUDED = (Path(__file__).with_name(name) for name in ("rms_norm.c", "wide.h"))
_NAMES = {torch.float32: "rms_norm_f32", torch.bfloat16: "rms_norm_bf16"}
_MIN_WIDTH = 256  # as in linear_layers.py: small backbones, whose norms take no time, keep torch's own bits
_SHARE = 64  # rows that are worth a thread


class _Call(ctypes.Structure):
    """The C struct `call`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "d", "num_threads")),
        ("eps", ctypes.c_float),
    ]


def status() -> Status:
    """Which form of RMSNorm serves on the CPU."""
    return _load()[1]


def serves(module: nn.Module) -> bool:
    """True if the kernel gives what this norm gives, up to the order of a sum; tried on a few rows."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or bias is not None or eps_of(module) is None:
        return False
    if weight.shape[0] < _MIN_WIDTH:
        return False
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(4, weight.shape[0], generator=generator)
    with torch.no_grad():
        x = x.to(weight.dtype) if weight.is_cpu else x
        if not _can(x, weight):
            return False
        return _agrees(rms_norm(x, weight, eps_of(module) or 0.0), module(x))


def eps_of(module: nn.Module) -> float | None:
    """What a norm adds to the mean of squares, by its two usual names."""
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    return eps if isinstance(eps, float) else None


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """What the norm's own forward gives; by the kernel where it can."""
    x, weight = args[0] if args else next(iter(kwargs.values())), module.weight
    if len(args) + len(kwargs) == 1 and isinstance(weight, Tensor) and _can(x, weight):
        return rms_norm(x, weight, eps_of(module) or 0.0)
    own: Tensor = type(module).__mro__[1].forward(module, *args, **kwargs)  # type: ignore[attr-defined]
    return own


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Give weight * x / sqrt(mean(x^2) + eps) over the last dimension; a row's bits do not depend on other rows.

    x: (…, d), weight: (d,), of one dtype that the kernel knows. The quotient is rounded to it, and the product.
    """
    return _rms_norm(_load()[0][x.dtype], x, weight, eps)


def _rms_norm(function: Callable[..., None], x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    d = x.shape[-1]
    rows, y = x.numel() // d, torch.empty_like(x)
    threads = torch.get_num_threads()
    if threads > 1:
        threads = min(threads, rows // _SHARE + 1)
    tape.call(function, _Call(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, d, threads, eps))
    return y


def _can(x: Any, weight: Tensor) -> bool:
    """True if the kernel knows these tensors and no gradient is to flow through them."""
    if not isinstance(x, Tensor) or x.dtype not in _load()[0] or x.dtype != weight.dtype or not x.numel():
        return False
    if not (x.is_cpu and weight.is_cpu and weight.is_contiguous() and x.shape[-1] == weight.shape[0]):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


def _agrees(found: Tensor, expected: Any) -> bool:
    """Equal, but for a sum in another order: float32 to its last bits, bfloat16 in all but few places."""
    if not isinstance(expected, Tensor) or (expected.shape, expected.dtype) != (found.shape, found.dtype):
        return False
    if found.dtype == torch.bfloat16:
        return bool((found == expected).float().mean() > 0.99)
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@functools.cache
@tape.apart
def _load() -> tuple[dict[torch.dtype, Callable[..., None]], Status]:
    """The kernel of each dtype, and the status; built at the first call."""
    try:
        library = ctypes.CDLL(str(compiled.build("rms_norm", [_SOURCE], included=[_INCLUDED])))
    except compiled.FAILURES as error:
        return {}, Status(False, f"torch normalises: {compiled.reason(error)}")
    functions = {dtype: getattr(library, name) for dtype, name in _NAMES.items()}
    for function in functions.values():
        function.restype = ctypes.c_int64
    return functions, Status(True, f"native RMSNorm for {platform.machine()}")
