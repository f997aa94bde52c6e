"""norm: other affine parameters for a LayerNorm or RMSNorm: delta = (weight - weight_0) * x_hat + (bias - bias_0).

x_hat is the normalised input, weight_0 and bias_0 the backbone's own. One adapter alone gives weight * x_hat + bias.
Tensors: weight (d,), and bias (d,) where the norm has one. Source: LayerNorm tuning (Zhao et al. 2023, arXiv
2312.11420). Weights are in the module's own convention; for norms that compute (1 + weight) * x_hat the one cancels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters_store.errors import ShapeError
from adapters_store.primitives.affine import AffineBank
from adapters_store.primitives.base import Entry, Place, Primitive, check_names, check_shape, wide


def is_norm(module: nn.Module) -> bool:
    """True for LayerNorm and for the RMSNorm classes of model libraries (they share no base class)."""
    named = type(module).__name__.endswith(("LayerNorm", "RMSNorm")) or isinstance(module, nn.LayerNorm)
    return named and isinstance(getattr(module, "weight", None), Tensor)


def _is_rms(module: nn.Module) -> bool:
    """True if the norm leaves the mean in: RMSNorms, and T5's LayerNorm, which is one."""
    return any(name in type(module).__name__ for name in ("RMS", "T5LayerNorm"))


def check(place: Place, entry: Entry) -> None:
    """Raises KeysError or ShapeError if the entry does not fit the place."""
    if not is_norm(place.module):
        raise ShapeError(f"norm at {entry.site}: this site is a {type(place.module).__name__}, not a norm")
    has_bias = getattr(place.module, "bias", None) is not None
    check_names(entry, {"weight"}, {"bias"} if has_bias else set(), set())
    for name in entry.tensors:
        check_shape(entry, name, (place.d_out,))


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """x_hat: (tokens, d) float32, x without the module's affine part."""
    x = wide(x)
    eps = getattr(module, "eps", None) or getattr(module, "variance_epsilon", None)
    if not _is_rms(module):
        return F.layer_norm(x, x.shape[-1:], eps=float(eps or 1e-5))
    return F.rms_norm(x, x.shape[-1:], eps=float(eps or torch.finfo(module.weight.dtype).eps))  # type: ignore[arg-type]


def delta(place: Place, entry: Entry, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001  # one signature for all
    """(weight - weight_0) * x_hat + (bias - bias_0). x: (tokens, d); returns (tokens, d) float32."""
    gain, shift = _parts(place.module, entry)
    return gain * normalised(place.module, x) + shift


def _parts(module: nn.Module, entry: Entry) -> tuple[Tensor, Tensor]:
    own_weight: Tensor = module.weight  # type: ignore[assignment]  # nn.Module types attributes loosely
    weight = wide(entry.tensors["weight"])
    gain = weight - own_weight.detach().to(weight.device, weight.dtype)
    if "bias" not in entry.tensors:
        return gain, torch.zeros_like(gain)
    own_bias: Tensor = module.bias  # type: ignore[assignment]
    return gain, wide(entry.tensors["bias"]) - own_bias.detach().to(gain.device, gain.dtype)


class NormBank(AffineBank):
    """Gain weight - weight_0 on the normalised input."""

    def prepare(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """(weight - weight_0, bias - bias_0), float32 on the device."""
        gain, shift = _parts(self.place.module, entry)
        return gain.to(self.device), shift.to(self.device)

    def source(self, x: Tensor, y: Tensor) -> Tensor:
        """The normalised input."""
        return normalised(self.place.module, x)


PRIMITIVE = Primitive("norm", check, delta, NormBank)
