"""A backbone's linear layers: as they were loaded, or laid out for the CPU's kernel.

`lay_out` moves a model's weights into strips (linear.py), once, before serving: a layer then has no other copy of them,
and its `weight` keeps shape and dtype only (it is on the meta device). `forward` stands in for the layer's own forward;
what the kernel cannot multiply, torch does, over weights put back for the moment. Layers as they were loaded stay
torch's: training needs them.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters_store import memory
from adapters_store.linear import Strips, linear, supports

_MIN_WEIGHTS = 256 * 256  # below, a call costs about as much as its arithmetic
_STRIPS = "_espalier_strips"  # attribute of a layer that is laid out
_FAILURES = (RuntimeError, TypeError, ValueError)  # what reading a weight that is away may raise


def lay_out(model: nn.Module, layers: Sequence[nn.Module], run: Callable[[], Tensor]) -> bool:
    """Lay out the weights of a frozen model's linear layers, of those that the kernel knows and that it pays for.

    layers: nn.Linear and transformers' Conv1D whose forward is `forward`. run: a forward of the model, which must give
    what it gave before, up to rounding; else all is put back. A weight that is another module's too (a tied embedding)
    stays beside its strips. Returns whether anything is laid out.
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


def strips_of(layer: nn.Module) -> Strips | None:
    """A layer's weight as it is laid out, if it is."""
    strips: Strips | None = layer.__dict__.get(_STRIPS)
    return strips


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
    strips = strips_of(layer)
    if strips is None and isinstance(layer, nn.Linear):
        return _as_loaded(input, layer.weight, layer.bias)
    if strips is None:
        own: Tensor = type(layer).__mro__[1].forward(layer, input)  # type: ignore[attr-defined]  # below its site's
        return own
    if _can(input, strips, layer.bias):
        return linear(input, strips, layer.bias)
    return F.linear(input, strips.weight(), layer.bias)


def _as_loaded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By torch's oneDNN where its usual library was measured to be slower: float32 on AMD's processors."""
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
    """True for whole float32 tensors on the CPU, through which no gradient is to flow."""
    parts = [part for part in (x, weight, bias) if part is not None]
    if any(part.dtype != torch.float32 or not (part.is_cpu and part.is_contiguous()) for part in parts):
        return False
    if x.shape[-1] != weight.shape[1] or not x.numel():
        return False
    return not (torch.is_grad_enabled() and any(part.requires_grad for part in parts))


def _can(x: Tensor, strips: Strips, bias: Tensor | None) -> bool:
    """True if the kernel knows these tensors and no gradient is to flow through them."""
    if not x.is_cpu or x.dtype != strips.words.dtype or x.shape[-1] != strips.d_in or not x.numel():
        return False
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
