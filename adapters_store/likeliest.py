"""Builds, checks and calls likeliest.c: the likeliest token on the CPU without most of the logits.

A `Screen` is a head's weights once more, in 8 bits, beside the strips that it is laid out in (linear.py). It gives the
token that the logits give, and reads a quarter as much (float32). Without a compiler or AVX512-VNNI, on a GPU, or where
the check fails, there is none; `status()` says why. ESPALIER_NATIVE=0 switches it off.
"""

import ctypes
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters_store import compiled, linear, memory, tape
from adapters_store.compiled import Status
from adapters_store.linear import STRIP, Strips

_INPUTS = 4  # of a word of 8-bit weights
_AT_ONCE = 1 << 24  # weights that are taken to 8 bits at a time
_UNIT = 2.0**-24  # of rounding in float32
_FLUSHED = 1e-35  # more than weights that are too small to be normal numbers: products of bfloat16 take them for 0
_MOST_INPUTS = 1 << 16  # of which sums in 8 bits fit into 32
_MIN_WEIGHTS = 1 << 20  # below, logits cost about as much as a call
_MIN_SHARE = 1 << 22  # products that are worth a thread
_MOST_ROWS = {torch.float32: 1 << 30, torch.bfloat16: 8}  # beyond, all products in bfloat16 are as fast (Zen 4)
_MOST_COMPUTED = 0.25  # share of the logits; if more are computed, a screen is given up
_TRIED = 1 << 16  # halves of strips, each of a row, after which it may be
_SOURCE, *_INCLUDED = (Path(__file__).with_name(name) for name in ("likeliest.c", "scratch.h", "strips.h"))
_LIKELIEST = {torch.float32: "likeliest_f32", torch.bfloat16: "likeliest_bf16"}

_Functions = dict[torch.dtype, Callable[..., int]]  # they release the GIL, and share torch's threads (same soname)


class _Call(ctypes.Structure):
    """The C struct `arguments`."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("q", "scale", "slack", "norm", "total", "weight", "x", "tokens", "counts")),
        *((n, ctypes.c_int64) for n in ("d_in", "d_out", "x_row", "rows", "num_threads")),
        ("most", ctypes.c_float),
    ]


class _Bounds(NamedTuple):
    """Weights in 8 bits, and what bounds the products with each output's.

    q: (strips, words, STRIP, 4) int8; scale, slack, norm: (strips * STRIP,) float32; total: the same, int32.
    """

    q: Tensor
    scale: Tensor
    slack: Tensor
    norm: Tensor
    total: Tensor

    @staticmethod
    def of(weight: Tensor) -> "_Bounds":
        """Of float32 weights (strips * STRIP, d_in)."""
        d_in = weight.shape[1]
        scale = weight.abs().amax(1) / 127
        near = (weight / scale[:, None].clamp(min=1e-37)).round_().clamp_(-127, 127)
        lost = (weight - near * scale[:, None]).norm(dim=1)
        norm = weight.norm(dim=1) * 1.001 + lost
        sums = (2 * d_in + 64) * _UNIT * norm  # in float32 they are off by d_in units at most
        slack = 1.001 * lost + sums + _FLUSHED
        padded = F.pad(near.to(torch.int8), (0, -d_in % _INPUTS))
        q = padded.view(len(weight) // STRIP, STRIP, -1, _INPUTS).transpose(1, 2)
        return _Bounds(q, scale, slack, norm, near.sum(1).int())


@dataclass(frozen=True)
class Screen:
    """A head that finds its largest products by bounds. counts: (2,) int64, halves of strips computed, and all so far.

    most: the largest of the norms.
    """

    strips: Strips
    bounds: _Bounds
    most: float
    counts: Tensor

    @staticmethod
    def of(strips: Strips) -> "Screen | None":
        """None for few weights, and for those that are not all finite. Takes a byte for each."""
        num_strips, d_in = strips.words.shape[0], strips.d_in
        if strips.d_out * d_in < _MIN_WEIGHTS or d_in > _MOST_INPUTS:
            return None
        q = memory.zeros(num_strips, -(-d_in // _INPUTS), STRIP, _INPUTS, dtype=torch.int8)
        rest, step = [], max(1, _AT_ONCE // (STRIP * d_in))
        for into, words in zip(torch.split(q, step), torch.split(strips.words, step), strict=True):
            part = _Bounds.of(Strips(words, len(words) * STRIP, d_in).weight().float())
            into.copy_(part.q)
            rest.append(part[1:])
        scale, slack, norm, total = (torch.cat(parts) for parts in zip(*rest, strict=True))
        most = float(norm.max())
        if not math.isfinite(most):
            return None
        return Screen(strips, _Bounds(q, scale, slack, norm, total), most, torch.zeros(2, dtype=torch.int64))

    @property
    def is_given_up(self) -> bool:
        """True if the bounds have excluded too few of the products to be worth their while."""
        computed, seen = self.counts.tolist()
        return bool(seen > _TRIED and computed > _MOST_COMPUTED * seen)

    def pays(self, rows: int) -> bool:
        """True if so many rows get their tokens faster than from all their logits."""
        return 0 < rows <= _MOST_ROWS[self.strips.words.dtype] and not self.is_given_up

    def likeliest(self, x: Tensor) -> Tensor:
        """The first of the outputs with the largest product with each row of x, (n, d_in): (n,) int64.

        -1 where the largest is not a finite number. x: of the strips' dtype. Raises MemoryError.
        """
        return _likeliest(_load()[0][x.dtype], x, self)


def status() -> Status:
    """How the likeliest token is found on the CPU."""
    return _load()[1]


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """True if the kernel can bound products of this dtype on this device."""
    return device.type == "cpu" and dtype in _load()[0]


def _likeliest(function: Callable[..., int], x: Tensor, screen: Screen) -> Tensor:
    strips, rows = screen.strips, len(x)
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens = x.new_empty(rows, dtype=torch.int64)
    threads = torch.get_num_threads()
    if threads > 1:
        threads = min(threads, rows * strips.d_in * strips.d_out // _MIN_SHARE + 1)
    read = [part.data_ptr() for part in (*screen.bounds, strips.words, x, tokens, screen.counts)]
    sizes = strips.d_in, strips.d_out, x.stride(0), rows, threads
    if tape.call(function, _Call(*read, *sizes, screen.most)):
        raise MemoryError(f"no memory to bound {strips.d_out} products of {rows} rows")
    return tokens


@functools.cache
@tape.apart
def _load() -> tuple[_Functions, Status]:
    """The kernel of each dtype that this processor has one for, and the status; built at the first call."""
    try:
        library = ctypes.CDLL(str(compiled.build("likeliest", [_SOURCE], included=_INCLUDED)))
    except compiled.FAILURES as error:
        return {}, Status(False, f"from all logits: {compiled.reason(error)}")
    functions = {dtype: getattr(library, name) for dtype, name in _LIKELIEST.items() if hasattr(library, name)}
    functions = {dtype: f for dtype, f in functions.items() if linear.supports(dtype, torch.device("cpu"))}
    for function in functions.values():
        function.restype = ctypes.c_int64
    if not functions:
        return {}, Status(False, "from all logits: the kernel is for processors with AVX512-VNNI")
    if not all(itertools.starmap(_agrees_with_logits, functions.items())):
        return {}, Status(False, "from all logits: the kernel is built, but finds other tokens")
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in functions)
    return functions, Status(True, f"from the logits that 8-bit weights do not exclude, {names}")


def _agrees_with_logits(dtype: torch.dtype, function: Callable[..., int]) -> bool:
    """Odd sizes, one row that is no number among others."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((9, 1101), (1003, 1101)))
    x[4, 7] = torch.nan
    strips = Strips.of(weight)
    screen = Screen.of(strips)
    expected = linear.linear(x, strips).argmax(1)
    expected[4] = -1
    return screen is not None and torch.equal(_likeliest(function, x, screen), expected)
