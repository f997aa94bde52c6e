"""bottleneck: a small MLP beside or behind a layer: delta = s * up f(down z).

z is the layer's input (parallel) or its output (series).

Parameters per site: down (r, d), kaiming-uniform; up (d_out, r), zeros: identity at the start; with `bias`, biases at
zero. r * (d + d_out) numbers per site. Choose it where low rank is not enough: it is not linear, so it cannot fold.
Sources: Houlsby et al. 2019 (series); He et al. 2021 (parallel, s = 4); LLM-Adapters, Hu et al. 2023 (arXiv
2304.01933).
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from adapters_store.kinds.base import Kind, KindConfig, Parameters
from adapters_store.primitives import Entry, Place
from adapters_store.primitives.base import Options
from adapters_store.roles import select
from adapters_store.sites import Sites


class BottleneckConfig(KindConfig):
    """Hyper-parameters of bottleneck."""

    mode: Literal["parallel", "series"] = Field("series", description="beside the layer, or behind it")
    r: int = Field(32, ge=1, description="width of the bottleneck")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field("relu", description="f")
    scale: float = Field(1.0, gt=0, description="s")
    bias: bool = Field(True, description="biases of both layers")
    target_modules: tuple[str, ...] = Field(("o", "down"), description="roles or ends of module paths")


class Bottleneck(Kind):
    """See the module."""

    name = "bottleneck"
    Config = BottleneckConfig

    def sites(self, sites: Sites, config: KindConfig) -> list[str]:
        """Sites that target_modules mean."""
        return select(sites, _typed(config).target_modules)

    def parameters(self, place: Place, config: KindConfig, generator: torch.Generator) -> Parameters:
        """Down uniform in +-1/sqrt(d), up zero."""
        typed, width = _typed(config), self._width(place, config)
        bound = 1 / math.sqrt(width)
        down = torch.empty(typed.r, width).uniform_(-bound, bound, generator=generator)
        parameters = {"down": down, "up": torch.zeros(place.d_out, typed.r)}
        biases = {"down_bias": torch.zeros(typed.r), "up_bias": torch.zeros(place.d_out)}
        return parameters | biases if typed.bias else parameters

    def export(self, place: Place, parameters: Mapping[str, Tensor], config: KindConfig) -> list[Entry]:
        """One bottleneck entry."""
        typed = _typed(config)
        source = "x" if typed.mode == "parallel" else "y"
        options: Options = {"activation": typed.activation, "input": source, "scale": typed.scale}
        return [Entry(place.name, "bottleneck", dict(parameters), options)]

    def num_parameters(self, place: Place, config: KindConfig) -> int:
        """Formula: r * (d + d_out), with biases + r + d_out."""
        typed = _typed(config)
        biases = typed.r + place.d_out if typed.bias else 0
        return typed.r * (self._width(place, config) + place.d_out) + biases

    @staticmethod
    def _width(place: Place, config: KindConfig) -> int:
        return place.d_in if _typed(config).mode == "parallel" else place.d_out


def _typed(config: KindConfig) -> BottleneckConfig:
    if not isinstance(config, BottleneckConfig):
        raise AssertionError("our bug: another kind's config")
    return config


KIND = Bottleneck()
