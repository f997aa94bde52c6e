"""norm: train the affine parameters of LayerNorms or RMSNorms.

Parameters per norm: weight (d,), and bias (d,) where the norm has one, starting as copies of the backbone's own. The
smallest kind there is. Source: LayerNorm tuning, Zhao et al. 2023 (arXiv 2312.11420); PEFT calls it LN_TUNING.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from adapters_store.kinds.base import Kind, KindConfig, Parameters
from adapters_store.primitives import Entry, Place
from adapters_store.roles import select
from adapters_store.sites import Sites


class NormConfig(KindConfig):
    """Hyper-parameters of norm."""

    target_modules: tuple[str, ...] = Field(("norm",), description="'norm' for all, or ends of module paths")


class Norm(Kind):
    """See the module."""

    name = "norm"
    Config = NormConfig

    def sites(self, sites: Sites, config: KindConfig) -> list[str]:
        """Sites that target_modules mean."""
        if not isinstance(config, NormConfig):
            raise AssertionError("our bug: another kind's config")
        return select(sites, config.target_modules)

    def parameters(self, place: Place, config: KindConfig, generator: torch.Generator) -> Parameters:
        """The backbone's own weight and bias."""
        own = {name: getattr(place.module, name, None) for name in ("weight", "bias")}
        return {name: tensor.detach().float().cpu().clone() for name, tensor in own.items() if tensor is not None}

    def export(self, place: Place, parameters: Mapping[str, Tensor], config: KindConfig) -> list[Entry]:
        """One norm entry."""
        return [Entry(place.name, "norm", dict(parameters))]

    def num_parameters(self, place: Place, config: KindConfig) -> int:
        """d, or 2 d with a bias."""
        return place.d_out * (1 if getattr(place.module, "bias", None) is None else 2)


KIND = Norm()
