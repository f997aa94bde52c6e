"""Builds, checks and calls linear.c: x W^T + b on the CPU, over weights that lie in strips.

linear_layers.py says which layers have their weights so. Without a compiler or AVX-512, on a GPU, or where the check
fails, there is no kernel; `status()` says why. ESPALIER_NATIVE=0 switches it off.
"""

import ctypes
import functools
import itertools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters_store import compiled, memory, tape
from adapters_store.compiled import Status

STRIP = 32  # outputs side by side; OUTPUTS in strips.h
RUNS = 128  # of memory in a prefetch_list, at most; as in prefetch.h
_MIN_SHARE = 1 << 20  # products that are worth a thread
_SOURCE, *_INCLUDED = (Path(__file__).with_name(f) for f in ("linear.c", "prefetch.h", "scratch.h", "strips.h"))
_LINEAR = {torch.float32: "linear_f32", torch.bfloat16: "linear_bf16"}

_Functions = dict[torch.dtype, Callable[..., int]]  # they release the GIL, and share torch's threads (same soname)


class _Call(ctypes.Structure):
    """The C struct `arguments`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "x", "y")),
        *((name, ctypes.c_int64) for name in ("d_in", "d_out", "x_row", "rows", "num_threads")),
        ("others", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Strips:
    """A weight (d_out, d_in) as the kernel reads it.

    words: (strips, words, STRIP, numbers of a word); a word is a float32, or two bfloat16 of neighbouring inputs. Where
    the weight has no number there is zero.
    """

    words: Tensor
    d_out: int
    d_in: int

    @staticmethod
    def of(weight: Tensor) -> "Strips":
        """A copy of a weight in strips."""
        d_out, d_in = weight.shape
        numbers = 4 // weight.element_size()
        padded = F.pad(weight.detach(), (0, -d_in % numbers, 0, -d_out % STRIP))
        whole = padded.contiguous().view(torch.int32)  # a word at a time: it stays whole
        strips = whole.view(padded.shape[0] // STRIP, STRIP, -1).transpose(1, 2)  # (strips, words, STRIP)
        words = memory.zeros(*strips.shape, dtype=torch.int32).copy_(strips)
        return Strips(words.view(weight.dtype).view(*strips.shape, numbers), d_out, d_in)

    def weight(self) -> Tensor:
        """The weight (d_out, d_in) again, the same bit for bit; a copy."""
        return self.words.transpose(1, 2).flatten(0, 1).flatten(1)[: self.d_out, : self.d_in].contiguous()


def status() -> Status:
    """Which form of linear layers serves on the CPU."""
    return _load()[1]


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """True if the kernel can multiply weights of this dtype on this device."""
    return device.type == "cpu" and dtype in _load()[0]


def linear(x: Tensor, strips: Strips, bias: Tensor | None = None) -> Tensor:
    """Give x W^T + b, without gradients; a row's result is the same bit for bit whatever the other rows are.

    x: (…, d_in), rows at any distance; bias: (d_out,), contiguous; all of the strips' dtype. Returns (…, d_out). Raises
    MemoryError.
    """
    return _linear(_load()[0][x.dtype], x, strips, bias)


@functools.cache
def idle_rows() -> int:
    """Rows from which on a layer leaves memory idle while it computes, as measured on one thread."""
    return ctypes.c_int64.in_dll(_library(), "linear_idle_rows").value


def prefetch_meanwhile(y: Tensor, listing: tape.KernelCall, address: int) -> None:
    """While a tape is recorded, let the layer that has just made y ask for what is read next; else nothing.

    listing: a call that writes what is read next, as a C prefetch_list, to the address; noted before the layer's.
    """
    layer = tape.last()
    if isinstance(layer, tuple) and isinstance(layer[1], _Call):
        arguments = layer[1]
        if arguments.y == y.data_ptr() and arguments.rows >= idle_rows():
            arguments.others = address
            tape.note_before_last(listing)


def _linear(function: Callable[..., int], x: Tensor, strips: Strips, bias: Tensor | None) -> Tensor:
    d_out, d_in = strips.d_out, strips.d_in
    y = x.new_empty(*x.shape[:-1], d_out)
    if not x.is_contiguous():
        x = x.reshape(-1, d_in)
        x = x if x.stride(1) == 1 else x.contiguous()
    rows = x.numel() // d_in
    row = d_in if x.is_contiguous() else x.stride(0)
    threads = torch.get_num_threads()
    if threads > 1:
        threads = min(threads, rows * d_in * d_out // _MIN_SHARE + 1)
    address = None if bias is None else bias.data_ptr()
    words = strips.words.data_ptr()
    if tape.call(function, _Call(words, address, x.data_ptr(), y.data_ptr(), d_in, d_out, row, rows, threads)):
        raise MemoryError(f"no memory to multiply {rows} rows of {d_in}")
    return y


@functools.cache
def _library() -> ctypes.CDLL:
    """The built kernels; raises one of compiled.FAILURES."""
    return ctypes.CDLL(str(compiled.build("linear", [_SOURCE], included=_INCLUDED)))


@functools.cache
@tape.apart
def _load() -> tuple[_Functions, Status]:
    """The kernel of each dtype that this processor has one for, and the status; built at the first call."""
    try:
        library = _library()
    except compiled.FAILURES as error:
        return {}, Status(False, f"torch multiplies: {compiled.reason(error)}")
    functions = {dtype: getattr(library, name) for dtype, name in _LINEAR.items() if hasattr(library, name)}
    if _has_matrix_units():
        functions.pop(torch.bfloat16, None)  # torch uses them; whether the kernel is faster there was not measured
    for function in functions.values():
        function.restype = ctypes.c_int64
    if not functions:
        return {}, Status(False, "torch multiplies: the kernel is for processors with AVX-512")
    if not all(itertools.starmap(_agrees_with_torch, functions.items())):
        return {}, Status(False, "built, but its results differ from torch's; torch multiplies")
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in functions)
    return functions, Status(True, f"native linear layers for {platform.machine()}, {names}")


def _has_matrix_units() -> bool:
    """True for processors with AMX."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()


def _agrees_with_torch(dtype: torch.dtype, function: Callable[..., int]) -> bool:
    """Odd sizes, short and long, with and without bias, against plain torch."""
    generator = torch.Generator().manual_seed(0)
    for rows, d_in, d_out in ((1, 83, 7), (9, 1101, 30), (109, 300, 65)):
        x, weight, bias = (
            torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, d_in), (d_out, d_in), (d_out,))
        )
        for b in (bias, None):
            expected = F.linear(x.float(), weight.float(), None if b is None else b.float())
            found = _linear(function, x, Strips.of(weight), b).float()
            if not torch.allclose(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2):
                return False
    return True
