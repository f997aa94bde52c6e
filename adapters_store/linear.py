"""Builds, checks and calls linear.c: a backbone's linear layers on the CPU, over weights laid out for it.

`lay_out` moves a model's weights into strips, once, before serving: a layer then has no other copy of them, and its
`weight` keeps shape and dtype only (it is on the meta device). `forward` stands in for nn.Linear's own forward; what
the kernel cannot multiply, torch does, over weights put back for the moment. Layers as they were loaded stay torch's:
training needs them. Without a compiler or AVX-512, on a GPU, or where the check fails, nothing is laid out; `status()`
says why. ESPALIER_NATIVE=0 switches the kernel off.
"""

import ctypes
import functools
import itertools
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters_store import compiled, memory
from adapters_store.compiled import Status

STRIP = 32  # outputs side by side; OUTPUTS in linear.c
_MIN_WEIGHTS = 256 * 256  # below, a call costs about as much as its arithmetic
_MIN_SHARE = 1 << 20  # products that are worth a thread
_MANY = 96  # rows from which on oneDNN is the faster of torch's libraries
_STRIPS = "_espalier_strips"  # attribute of a layer that is laid out
_SOURCE = Path(__file__).with_name("linear.c")
_LINEAR = {torch.float32: "linear_f32", torch.bfloat16: "linear_bf16"}
_FAILURES = (RuntimeError, TypeError, ValueError, NotImplementedError)  # what reading a weight that is away may raise

_Functions = dict[torch.dtype, Callable[..., int]]  # they release the GIL, and share torch's threads (same soname)


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


def lay_out(model: nn.Module, layers: Sequence[nn.Module], run: Callable[[], Tensor]) -> bool:
    """Lay out the weights of a frozen model's linear layers, of those that the kernel knows and that it pays for.

    layers: nn.Linear and transformers' Conv1D whose forward is `forward`. run: a forward of the model, which must give
    what it gave before, up to rounding; else all is put back. A weight that is another module's too (a tied embedding)
    stays beside its strips.
    Returns whether anything is laid out.
    """
    chosen = [layer for layer in layers if _pays(layer)]
    if not chosen:
        return False
    expected = run()
    shared = _shared_weights(model)
    with memory.side_by_side(sum(layer.weight.nbytes for layer in chosen)):  # type: ignore[misc]
        for layer in chosen:
            _lay_out(layer, keeps_weight=id(layer.weight) in shared)
    if _still_gives(run, expected, 0.05 if torch.bfloat16 in {layer.weight.dtype for layer in chosen} else 1e-3):
        return True
    for layer in chosen:
        put_back(layer)
    return False


def put_back(layer: nn.Module) -> None:
    """Give a layer its weight as it was loaded, if it is laid out."""
    strips: Strips | None = layer.__dict__.pop(_STRIPS, None)
    if strips is not None and layer.weight.is_meta:
        layer.weight = nn.Parameter(_turned(layer, strips.weight()).contiguous(), requires_grad=False)


def _lay_out(layer: nn.Module, *, keeps_weight: bool) -> None:
    weight: Tensor = layer.weight  # type: ignore[assignment]  # nn.Module types attributes loosely
    layer.__dict__[_STRIPS] = Strips.of(_turned(layer, weight))
    if not keeps_weight:
        layer.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)


def _turned(layer: nn.Module, weight: Tensor) -> Tensor:
    """From a layer's weight to (d_out, d_in), or back: Conv1D keeps it the other way round."""
    return weight if isinstance(layer, nn.Linear) else weight.mT


def _pays(layer: nn.Module) -> bool:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    is_free = not weight.requires_grad and weight.numel() >= _MIN_WEIGHTS
    return is_free and not weight.is_meta and supports(weight.dtype, weight.device)


def _shared_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that stand at more than one place of a model."""
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in places.items() if count > 1}


def _still_gives(run: Callable[[], Tensor], expected: Tensor, tolerance: float) -> bool:
    try:
        found = run()
    except _FAILURES:
        return False
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0))


def forward(layer: Any, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's name for it
    """What the layer's own forward gives: x W^T + b."""
    strips: Strips | None = layer.__dict__.get(_STRIPS)
    if strips is None and isinstance(layer, nn.Linear):
        return _as_loaded(input, layer.weight, layer.bias)
    if strips is None:
        own: Tensor = type(layer).__mro__[1].forward(layer, input)  # type: ignore[attr-defined]  # below its site's
        return own
    if _can(input, strips, layer.bias):
        return linear(input, strips, layer.bias)
    return F.linear(input, strips.weight(), layer.bias)


def _as_loaded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By torch's oneDNN where its usual library was measured to take twice as long: float32 on AMD's processors."""
    if _is_amd() and weight.numel() >= _MIN_WEIGHTS and _is_plain(x, weight, bias):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # noqa: SLF001  # its name
        return found
    return F.linear(x, weight, bias)


@functools.cache
def _is_amd() -> bool:
    """True on AMD's processors, with oneDNN in torch."""
    cpuinfo = Path("/proc/cpuinfo")
    has_library = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return has_library and cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """True for many rows of whole float32 tensors on the CPU, through which no gradient is to flow."""
    parts = [part for part in (x, weight, bias) if part is not None]
    if any(part.dtype != torch.float32 or not (part.is_cpu and part.is_contiguous()) for part in parts):
        return False
    if x.shape[-1] != weight.shape[1] or x.numel() <= _MANY * x.shape[-1]:
        return False
    return not (torch.is_grad_enabled() and any(part.requires_grad for part in parts))


def _can(x: Tensor, strips: Strips, bias: Tensor | None) -> bool:
    """True if the kernel knows these tensors and no gradient is to flow through them."""
    if not x.is_cpu or x.dtype != strips.words.dtype or x.shape[-1] != strips.d_in or not x.numel():
        return False
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))


def linear(x: Tensor, strips: Strips, bias: Tensor | None = None) -> Tensor:
    """Give x W^T + b, without gradients; a row's result is the same bit for bit whatever the other rows are.

    x: (…, d_in), rows at any distance; bias: (d_out,), contiguous; all of the strips' dtype. Returns (…, d_out). Raises
    MemoryError.
    """
    return _linear(_load()[0][x.dtype], x, strips, bias)


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
    address = 0 if bias is None else bias.data_ptr()
    if function(strips.words.data_ptr(), address, d_in, d_out, x.data_ptr(), row, rows, y.data_ptr(), threads):
        raise MemoryError(f"no memory to multiply {rows} rows of {d_in}")
    return y


@functools.cache
def _load() -> tuple[_Functions, Status]:
    """The kernel of each dtype that this processor has one for, and the status; built at the first call."""
    try:
        library = ctypes.CDLL(str(compiled.build("linear", [_SOURCE])))
    except compiled.FAILURES as error:
        return {}, Status(False, f"torch multiplies: {compiled.reason(error)}")
    functions = {dtype: getattr(library, name) for dtype, name in _LINEAR.items() if hasattr(library, name)}
    if _has_matrix_units():
        functions.pop(torch.bfloat16, None)  # torch uses them; whether the kernel is faster there was not measured
    for function in functions.values():
        function.argtypes, function.restype = [ctypes.c_int64] * 9, ctypes.c_int64
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
