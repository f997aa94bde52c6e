"""Builds, checks and calls rotary.c: rotary position embeddings in one call instead of nine, on the CPU.

Attention layers of model libraries call a function of their module, `apply_rotary_pos_emb`. `install` gives those whose
function turns as the kernel does, bit for bit, a forward that calls the kernel in its place: their class's own code
under a subclass, with this one name bound anew. What the kernel cannot turn, the library's function does, as it does
without a compiler, on a GPU and where gradients are wanted. ESPALIER_NATIVE=0 switches the kernel off.
"""

import ctypes
import functools
import platform
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from adapters_store import compiled, tape
from adapters_store.compiled import Status

_SOURCE, _INCLUDED = (Path(__file__).with_name(name) for name in ("rotary.c", "wide.h"))
_FLAGS = (*compiled.FLAGS, "-ffp-contract=off")  # rotary.c says why
_KERNELS = {torch.float32: "rotary_f32", torch.bfloat16: "rotary_bf16"}
_FUNCTION = "apply_rotary_pos_emb"
_SHARE = 64  # tokens that are worth a thread

Rotation = Callable[..., tuple[Tensor, Tensor]]  # (q, k, cos, sin): (1, heads, tokens, d) each, then (1, tokens, d)


class _Call(ctypes.Structure):
    """The C struct `call`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "y")),
        *(
            (name, ctypes.c_int64)
            for name in ("heads", "tokens", "d", "x_head", "x_token", "y_head", "y_token", "num_threads")
        ),
    ]


def status() -> Status:
    """Which form of rotary embeddings serves on the CPU."""
    return _load()[1]


def install(model: nn.Module) -> int:
    """Let a model's attention layers turn queries and keys by the kernel, where it gives the same; how many do."""
    found = 0
    for module in model.modules():
        own = _rotation_of(type(module))
        if own is not None and serves(own):
            module.__class__ = _turning(type(module))  # type: ignore[arg-type]  # mypy takes nn.Module for unhashable
            found += 1
    return found


def _rotation_of(cls: type[nn.Module]) -> Rotation | None:
    """The library's function that the code of a class's forward calls; None if it calls none, or ours already."""
    forward = cls.forward
    if not isinstance(forward, FunctionType) or _FUNCTION not in forward.__code__.co_names:
        return None
    own: Rotation | None = forward.__globals__.get(_FUNCTION)
    return own if isinstance(own, FunctionType) and own.__module__ != __name__ else None


@functools.cache
@tape.apart
def serves(own: Rotation) -> bool:
    """True if the kernel gives what a library's function gives, bit for bit; tried on a few tokens."""
    if not status().active:
        return False
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(1, 5, 24, generator=generator).repeat(1, 1, 2)
    for dtype in _load()[0]:
        q, k = (torch.randn(1, 5, heads, 48, generator=generator).to(dtype).transpose(1, 2) for heads in (4, 2))
        given = q, k, angles.cos().to(dtype), angles.sin().to(dtype)
        try:
            expected = own(*given)
        except Exception:  # noqa: BLE001  # whatever else of this name: it stays
            return False
        if not all(map(torch.equal, rotate(*given), expected)):
            return False
    return True


@functools.cache
def _turning(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an attention layer's class whose forward calls the kernel."""
    forward: Any = cls.forward
    names = forward.__globals__ | {_FUNCTION: _or_kernel(forward.__globals__[_FUNCTION])}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return type(cls.__name__, (cls,), {"forward": ours, "__module__": cls.__module__})


def _or_kernel(own: Rotation) -> Rotation:
    """What stands in for a library's function."""

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not args and not kwargs and _can(q, cos, sin) and _can(k, cos, sin):
            return rotate(q, k, cos, sin)
        return own(q, k, cos, sin, *args, **kwargs)

    return turned


def _can(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """True if the kernel knows these tensors and no gradient is to flow through them."""
    if x.ndim != 4 or not x.is_cpu or x.dtype not in _load()[0] or x.stride(3) != 1 or not x.numel():
        return False
    shape = (1, x.shape[2], x.shape[3])
    if x.shape[0] != 1 or x.shape[3] % 2 or any(part.shape != shape or part.dtype != x.dtype for part in (cos, sin)):
        return False
    return cos.is_contiguous() and sin.is_contiguous() and not (torch.is_grad_enabled() and x.requires_grad)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Give x * cos + rotate_half(x) * sin for q and k, as Llama turns them (RoPE, arXiv 2104.09864).

    q, k: (1, heads, tokens, d) of any strides but the last dimension's; cos, sin: (1, tokens, d), contiguous.
    """
    function, threads = _load()[0][q.dtype], torch.get_num_threads()
    if threads > 1:
        threads = min(threads, q.shape[2] // _SHARE + 1)
    return _rotated(function, q, cos, sin, threads), _rotated(function, k, cos, sin, threads)


def _rotated(function: Callable[..., None], x: Tensor, cos: Tensor, sin: Tensor, threads: int) -> Tensor:
    y, (_, heads, tokens, d) = torch.empty_like(x), x.shape
    (_, x_head, x_token, _), (_, y_head, y_token, _) = x.stride(), y.stride()
    pointers = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr()
    call = _Call(*pointers, heads, tokens, d, x_head, x_token, y_head, y_token, threads)
    tape.call(function, call)
    return y


@functools.cache
@tape.apart
def _load() -> tuple[dict[torch.dtype, Callable[..., None]], Status]:
    """The kernel of each dtype, and the status; built at the first call."""
    try:
        library = ctypes.CDLL(str(compiled.build("rotary", [_SOURCE], _FLAGS, included=[_INCLUDED])))
    except compiled.FAILURES as error:
        return {}, Status(False, f"torch turns: {compiled.reason(error)}")
    functions = {dtype: getattr(library, name) for dtype, name in _KERNELS.items()}
    for function in functions.values():
        function.restype = ctypes.c_int64
    return functions, Status(True, f"native rotary embeddings for {platform.machine()}")
