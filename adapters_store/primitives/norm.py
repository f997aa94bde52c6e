"""norm: other affine parameters for a LayerNorm or RMSNorm: delta = (weight - weight_0) * x_hat + (bias - bias_0).

x_hat is the normalised input, weight_0 and bias_0 the backbone's own. One adapter alone gives weight * x_hat + bias.
Tensors: weight (d,), and bias (d,) where the norm has one. Source: LayerNorm tuning (Zhao et al. 2023, arXiv 2312.11420).
Weights are in the module's own convention; for norms that compute (1 + weight) * x_hat the one cancels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters_store.errors import ShapeError
from adapters_store.primitives.affine import AffineBank
from adapters_store.primitives.base import Entry, Place, Primitive, check_names, check_shape


def is_norm(module: nn.Module) -> bool:
    """True for LayerNorm and for the RMSNorm classes of model libraries (they share no base class)."""
    named = type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    return isinstance(module, nn.LayerNorm) or (named and isinstance(getattr(module, "weight", None), Tensor))


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
    x = x.float()
    if "RMS" in type(module).__name__:
        eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None) or 1e-6
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + float(eps))
    eps = getattr(module, "eps", None) or getattr(module, "variance_epsilon", None) or 1e-5
    return F.layer_norm(x, x.shape[-1:], eps=float(eps))


def delta(place: Place, entry: Entry, x: Tensor, y: Tensor) -> Tensor:
    """(weight - weight_0) * x_hat + (bias - bias_0). x: (tokens, d); returns (tokens, d) float32."""
    gain, shift = _parts(place.module, entry)
    return gain * normalised(place.module, x) + shift


def _parts(module: nn.Module, entry: Entry) -> tuple[Tensor, Tensor]:
    own_weight: Tensor = module.weight  # type: ignore[assignment]  # nn.Module types attributes loosely
    gain = entry.tensors["weight"].float() - own_weight.detach().float().to(entry.tensors["weight"].device)
    if "bias" not in entry.tensors:
        return gain, torch.zeros_like(gain)
    own_bias: Tensor = module.bias  # type: ignore[assignment]
    return gain, entry.tensors["bias"].float() - own_bias.detach().float().to(gain.device)


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
