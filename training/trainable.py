"""An adapter while it is trained: a kind's parameters at its sites and a task's objective, on the way to primitives."""

from collections.abc import Mapping

import torch
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.kinds import Kind, KindConfig
from adapters_store.primitives import Entry, Place
from adapters_store.sites import Sites
from training import seeds
from training.objectives import Objective


class TrainableAdapter:
    """A kind with its parameters at every site where it acts, and the objective it is trained by.

    Initial values depend on the seed and on what they are for. An adapter's depend on (seed, site) and a head's on
    (seed, label), not on the task: only adapters that start from one point can be compared by their weights
    (measured; see relations/weights.py).
    """

    def __init__(self, kind: Kind, config: KindConfig, sites: Sites, objective: Objective, seed: int) -> None:
        """Parameters are float32 on the backbone's device, whatever the backbone's dtype."""
        self.kind, self.config, self.objective = kind, config, objective
        self.places: dict[str, Place] = {name: sites[name].place for name in kind.sites(sites, config)}
        self.parameters: dict[str, dict[str, Tensor]] = {
            name: _trained(kind.parameters(place, config, seeds.generator(seed, kind.name, name)), sites.device)
            for name, place in self.places.items()
        }

    def entries(self) -> list[Entry]:
        """What the sites run, by the kind's exporter; gradients flow to the parameters."""
        parts = [self.kind.export(self.places[name], self.parameters[name], self.config) for name in self.places]
        return [entry for part in parts for entry in part]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is trained, by a name that is unique within the adapter. The tensors themselves."""
        own = {f"{site}/{name}": tensor for site, some in self.parameters.items() for name, tensor in some.items()}
        return own | self.head_tensors()

    def head_tensors(self) -> dict[str, Tensor]:
        """The head's part of `tensors`."""
        return {f"head/{name}": tensor for name, tensor in self.objective.tensors().items()}

    def copy(self) -> dict[str, Tensor]:
        """A copy of `tensors` as they are now, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take these values, named as in `tensors`; in place, so that an optimiser keeps hold of its parameters."""
        for name, tensor in self.tensors().items():
            tensor.copy_(values[name])

    def frozen_entries(self) -> list[Entry]:
        """`entries` without gradients: copies, which later training does not change."""
        with torch.no_grad():
            return [
                Entry(e.site, e.primitive, {name: t.detach().clone() for name, t in e.tensors.items()}, e.options)
                for e in self.entries()
            ]

    def adapter(self) -> Adapter:
        """The adapter as it is published: entries and head, if it has one, detached, on the CPU."""
        entries = [
            Entry(e.site, e.primitive, {name: t.cpu() for name, t in e.tensors.items()}, e.options)
            for e in self.frozen_entries()
        ]
        return Adapter(entries, self.objective.head)

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained, head included."""
        return sum(tensor.numel() for tensor in self.tensors().values())


def _trained(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}
