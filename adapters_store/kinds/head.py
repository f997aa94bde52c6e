"""head: no adapter at all, only the task's head on the bare backbone. The baseline every kind must beat.

No parameters at any site; the head's own are trained as with every other kind.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from adapters_store.kinds.base import Kind, KindConfig, Parameters
from adapters_store.primitives import Entry, Place
from adapters_store.sites import Sites


class HeadConfig(KindConfig):
    """head has no hyper-parameters."""


class HeadOnly(Kind):
    """See the module."""

    name = "head"
    Config = HeadConfig

    def sites(self, sites: Sites, config: KindConfig) -> list[str]:
        """None."""
        return []

    def parameters(self, place: Place, config: KindConfig, generator: torch.Generator) -> Parameters:
        """None."""
        return {}

    def export(self, place: Place, parameters: Mapping[str, Tensor], config: KindConfig) -> list[Entry]:
        """None."""
        return []

    def num_parameters(self, place: Place, config: KindConfig) -> int:
        """0."""
        return 0


KIND = HeadOnly()
