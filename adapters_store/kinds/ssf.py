"""ssf: scale and shift the features behind a layer: y' = scale * y + shift.

Parameters per site: scale (d_out,), ones; shift (d_out,), zeros: identity at the start. 2 * d_out numbers per site, by
default behind every linear layer and norm. Choose it for hundreds of tiny adapters of tasks close to the backbone's.
Source: Lian et al. 2022, "Scaling & Shifting Your Features" (arXiv 2210.08823).
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from adapters_store.kinds.base import Kind, KindConfig, Parameters
from adapters_store.primitives import Entry, Place
from adapters_store.roles import select
from adapters_store.sites import Sites


class SSFConfig(KindConfig):
    """Hyper-parameters of ssf."""

    target_modules: tuple[str, ...] = Field(("all-linear", "norm"), description="roles or ends of module paths")


class SSF(Kind):
    """See the module."""

    name = "ssf"
    Config = SSFConfig

    def sites(self, sites: Sites, config: KindConfig) -> list[str]:
        """Sites that target_modules mean."""
        if not isinstance(config, SSFConfig):
            raise AssertionError("our bug: another kind's config")
        return select(sites, config.target_modules)

    def parameters(self, place: Place, config: KindConfig, generator: torch.Generator) -> Parameters:
        """Scale ones, shift zeros."""
        return {"scale": torch.ones(place.d_out), "shift": torch.zeros(place.d_out)}

    def export(self, place: Place, parameters: Mapping[str, Tensor], config: KindConfig) -> list[Entry]:
        """One scale_shift entry."""
        return [Entry(place.name, "scale_shift", dict(parameters))]

    def num_parameters(self, place: Place, config: KindConfig) -> int:
        """2 * d_out."""
        return 2 * place.d_out


KIND = SSF()
