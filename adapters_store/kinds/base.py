"""What a kind is: how a method parameterises an adapter, and how that becomes primitives.

A kind knows its hyper-parameters (`Config`), where it acts, its parameters at a site and their initial values, and
its exporter. Training differentiates through the exporter, so what is trained is what is served, and a kind needs no
code in the server.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from adapters_store.primitives import Entry, Place
from adapters_store.sites import Sites

Parameters = dict[str, Tensor]


class KindConfig(BaseModel):
    """Hyper-parameters of a kind; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Kind(ABC):
    """A method. Subclasses are stateless; one file each."""

    name: ClassVar[str]
    Config: ClassVar[type[KindConfig]]

    @abstractmethod
    def sites(self, sites: Sites, config: KindConfig) -> list[str]:
        """Names of the sites where the method acts."""

    @abstractmethod
    def parameters(self, place: Place, config: KindConfig, generator: torch.Generator) -> Parameters:
        """Initial trainable tensors at a site, float32."""

    @abstractmethod
    def export(self, place: Place, parameters: Mapping[str, Tensor], config: KindConfig) -> list[Entry]:
        """The primitives that the parameters mean at a site; differentiable."""

    @abstractmethod
    def num_parameters(self, place: Place, config: KindConfig) -> int:
        """How many numbers are trained at a site, by the method's formula."""
