"""lora: low-rank adaptation. delta = s * B (A x), s = alpha / r, or alpha / sqrt(r) with rank stabilisation.

Parameters per site: A (r, d_in), kaiming-uniform as in PEFT; B (d_out, r), zeros, so a fresh adapter changes nothing.
r * (d_in + d_out) numbers per site. Choose it first: it serves fastest and every tool can read it.
`rank_pattern` and `alpha_pattern` set r and alpha for modules by the end of their path, as in PEFT.
Sources: Hu et al. 2021 (arXiv 2106.09685); rsLoRA, Kalajdzievski 2023 (arXiv 2312.03732).
"""

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from adapters_store.kinds.base import Kind, KindConfig, Parameters
from adapters_store.primitives import Entry, Place
from adapters_store.roles import by_pattern, select
from adapters_store.sites import Sites


class LoRAConfig(KindConfig):
    """Hyper-parameters of lora, named as in PEFT."""

    r: int = Field(8, ge=1, description="rank")
    lora_alpha: float = Field(16.0, gt=0, description="scale: delta is multiplied by lora_alpha / r")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead")
    target_modules: tuple[str, ...] = Field(("q", "v"), description="roles, ends of module paths, or all-linear")
    rank_pattern: dict[str, int] = Field({}, description="r for modules whose path ends so")
    alpha_pattern: dict[str, float] = Field({}, description="lora_alpha for modules whose path ends so")


class LoRA(Kind):
    """See the module."""

    name = "lora"
    Config = LoRAConfig

    def sites(self, sites: Sites, config: KindConfig) -> list[str]:
        """Sites that target_modules mean."""
        return select(sites, _typed(config).target_modules)

    def parameters(self, place: Place, config: KindConfig, generator: torch.Generator) -> Parameters:
        """A uniform in +-1/sqrt(d_in) (kaiming with a = sqrt 5), B zero."""
        rank, bound = self.rank(place.name, config), 1 / math.sqrt(place.d_in)
        A = torch.empty(rank, place.d_in).uniform_(-bound, bound, generator=generator)
        return {"A": A, "B": torch.zeros(place.d_out, rank)}

    def export(self, place: Place, parameters: Mapping[str, Tensor], config: KindConfig) -> list[Entry]:
        """One lowrank entry."""
        return [Entry(place.name, "lowrank", dict(parameters), {"scale": self.scale(place.name, config)})]

    def num_parameters(self, place: Place, config: KindConfig) -> int:
        """Formula: r * (d_in + d_out)."""
        return self.rank(place.name, config) * (place.d_in + place.d_out)

    def rank(self, name: str, config: KindConfig) -> int:
        """Rank r at a site."""
        return int(by_pattern(name, _typed(config).rank_pattern, _typed(config).r))

    def scale(self, name: str, config: KindConfig) -> float:
        """Scale s at a site."""
        typed, rank = _typed(config), self.rank(name, config)
        alpha = by_pattern(name, typed.alpha_pattern, typed.lora_alpha)
        return alpha / math.sqrt(rank) if typed.use_rslora else alpha / rank


def _typed(config: KindConfig) -> LoRAConfig:
    if not isinstance(config, LoRAConfig):
        raise AssertionError("our bug: another kind's config")
    return config


KIND = LoRA()
