"""Builds, checks and calls linear.c: a backbone's linear layers on few rows, on the CPU.

Decoding steps and small requests multiply each weight with a few rows only, and libraries made for many rows then spend
their time on laying weights out anew instead of reading them. `forward` stands in for nn.Linear's own forward and takes
the kernel where it is faster, and for many rows the faster of torch's own libraries. Without a compiler or AVX-512, on
a GPU, or where the check fails, torch serves; `status()` says which and why. ESPALIER_NATIVE=0 switches the kernel off.
"""

import ctypes
import functools
import itertools
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters_store import compiled
from adapters_store.compiled import Status

MAX_ROWS = 96  # on Zen 5, bfloat16 is even with torch there; on Zen 4 the kernel is still up to 1.2 times as fast
_MIN_WEIGHTS = 256 * 256  # below, a call costs about as much as its arithmetic
_MIN_SHARE = 1 << 20  # products that are worth a thread
_SOURCE = Path(__file__).with_name("linear.c")
_LINEAR = {torch.float32: "linear_f32", torch.bfloat16: "linear_bf16"}


_Functions = dict[torch.dtype, Callable[..., None]]  # they release the GIL, and share torch's threads (same soname)


def status() -> Status:
    """Which form of linear layers serves few rows on the CPU."""
    return _load()[1]


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """True if the kernel can multiply weights of this dtype on this device."""
    return device.type == "cpu" and dtype in _load()[0]


def pays(rows: int, d_in: int, d_out: int) -> bool:
    """True where the kernel is faster than torch, or as fast, with weights that come from memory."""
    return 0 < rows <= MAX_ROWS and d_in * d_out >= _MIN_WEIGHTS


def forward(layer: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's name for it
    """What nn.Linear's own forward gives: x W^T + b; by what is fastest where no gradient is wanted."""
    weight, bias = layer.weight, layer.bias
    d_out, d_in = weight.shape
    rows = input.numel() // (d_in or 1)
    if d_in * d_out < _MIN_WEIGHTS or not rows or not _can(input, weight, bias):
        return F.linear(input, weight, bias)
    if pays(rows, d_in, d_out):
        return linear(input, weight, bias)
    return _many_rows(input, weight, bias)


def _many_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By torch's oneDNN where its usual library was measured to take twice as long: float32 on AMD's processors."""
    if x.dtype == torch.float32 and _is_amd() and x.is_contiguous():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # noqa: SLF001  # its name
        return found
    return F.linear(x, weight, bias)


@functools.cache
def _is_amd() -> bool:
    """True on AMD's processors, with oneDNN in torch."""
    cpuinfo = Path("/proc/cpuinfo")
    has_library = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return has_library and cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


def _can(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """True if the kernel knows these tensors and no gradient is to flow through them."""
    if x.dtype not in _load()[0] or not (x.is_cpu and weight.is_cpu and weight.is_contiguous()):
        return False
    if x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        return False  # for torch to say
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        return False
    return not (torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, weight, bias)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Give x W^T + b, without gradients; a row's result is the same bit for bit whatever the other rows are.

    x: (…, d_in), rows at any distance; weight: (d_out, d_in) and bias: (d_out,), contiguous; all of one dtype that
    `supports` knows. Returns (…, d_out).
    """
    return _linear(_load()[0][x.dtype], x, weight, bias)


def _linear(function: Callable[..., None], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    d_out, d_in = weight.shape
    y = x.new_empty(*x.shape[:-1], d_out)
    if not x.is_contiguous():
        x = x.reshape(-1, d_in)
        x = x if x.stride(1) == 1 else x.contiguous()
    rows = x.numel() // d_in
    row = d_in if x.is_contiguous() else x.stride(0)
    threads = torch.get_num_threads()
    if threads > 1:
        threads = min(threads, rows * d_in * d_out // _MIN_SHARE + 1)
    address = 0 if bias is None else bias.data_ptr()
    function(weight.data_ptr(), address, d_in, d_out, x.data_ptr(), row, rows, y.data_ptr(), threads)
    return y


@functools.cache
def _load() -> tuple[_Functions, Status]:
    """The kernel of each dtype that this processor has one for, and the status; built at the first call."""
    try:
        library = ctypes.CDLL(str(compiled.build("linear", [_SOURCE])))
    except compiled.FAILURES as error:
        return {}, Status(False, f"torch multiplies few rows: {compiled.reason(error)}")
    functions = {dtype: getattr(library, name) for dtype, name in _LINEAR.items() if hasattr(library, name)}
    if _has_matrix_units():
        functions.pop(torch.bfloat16, None)  # torch uses them; whether the kernel is faster there was not measured
    for function in functions.values():
        function.argtypes, function.restype = [ctypes.c_int64] * 9, None
    if not functions:
        return {}, Status(False, "torch multiplies few rows: the kernel is for processors with AVX-512")
    if not all(itertools.starmap(_agrees_with_torch, functions.items())):
        return {}, Status(False, "built, but its results differ from torch's; torch multiplies few rows")
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in functions)
    return functions, Status(True, f"native linear layers of few rows for {platform.machine()}, {names}")


def _has_matrix_units() -> bool:
    """True for processors with AMX."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()


def _agrees_with_torch(dtype: torch.dtype, function: Callable[..., None]) -> bool:
    """Odd sizes, short and long, with and without bias, against plain torch."""
    generator = torch.Generator().manual_seed(0)
    for rows, d_in, d_out in ((1, 83, 7), (9, 1101, 30), (29, 300, 5)):
        x, weight, bias = (
            torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, d_in), (d_out, d_in), (d_out,))
        )
        for b in (bias, None):
            expected = F.linear(x.float(), weight.float(), None if b is None else b.float())
            found = _linear(function, x, weight, b).float()
            if not torch.allclose(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2):
                return False
    return True
