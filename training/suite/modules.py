"""K adapters on one backbone, in training or frozen: module k lies in slot k of the sites.

Their initial values depend on the seed and the site, and, where modules train together, on their number too: modules
that start from one point and get one gradient would stay one module.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.kinds import KindConfig
from adapters_store.kinds import kind as kind_of
from adapters_store.mixing import Mix
from adapters_store.primitives import Entry, Place
from training import seeds
from training.config import listed, validate
from training.tail import Tail


class Modules:
    """K adapters of one kind at the sites of a tail. `sets` of their entries are made resident by `resident`."""

    def __init__(
        self, tail: Tail, count: int, seed: int, kind: str = "lora", hyperparameters: Mapping[str, Any] = {},
        *, alike: bool = False,
    ) -> None:  # fmt: skip
        """alike: all start from the same values, as adapters that are trained apart and compared by weights should."""
        self.tail, self.kind = tail, kind_of(kind)
        given = {"target_modules": "all-linear"} | dict(hyperparameters) if kind == "lora" else dict(hyperparameters)
        self.config: KindConfig = validate(
            self.kind.Config, listed(self.kind.Config, given), f"hyperparameter of {kind}"
        )
        sites = tail.encoder.sites
        places = [sites[name].place for name in self.kind.sites(sites, self.config)]
        self.places: dict[str, Place] = {place.name: place for place in places if place.layer >= tail.first}
        self.parameters = [self._new(seed, "" if alike else k) for k in range(count)]

    def __len__(self) -> int:
        return len(self.parameters)

    def _new(self, seed: int, which: object) -> dict[str, dict[str, Tensor]]:
        def trained(place: Place) -> dict[str, Tensor]:
            drawn = self.kind.parameters(place, self.config, seeds.generator(seed, self.kind.name, place.name, which))
            return {name: tensor.requires_grad_() for name, tensor in drawn.items()}

        return {name: trained(place) for name, place in self.places.items()}

    def tensors(self) -> list[Tensor]:
        """All that is trained."""
        return [tensor for module in self.parameters for site in module.values() for tensor in site.values()]

    def entries(self, k: int, *, frozen: bool = False) -> list[Entry]:
        """What the sites run of module k; gradients flow to the parameters unless frozen."""
        with torch.set_grad_enabled(not frozen):
            parts = [self.kind.export(self.places[name], self.parameters[k][name], self.config) for name in self.places]
        found = [entry for part in parts for entry in part]
        return [_detached(entry) for entry in found] if frozen else found

    def adapters(self) -> list[Adapter]:
        """The modules as adapters without heads, detached."""
        return [Adapter(self.entries(k, frozen=True), None) for k in range(len(self))]

    @contextmanager
    def resident(self, *, frozen: bool = False) -> Iterator[None]:
        """While inside, module k is in slot k."""
        with resident(self.tail, [self.entries(k, frozen=frozen) for k in range(len(self))]):
            yield


@contextmanager
def resident(tail: Tail, entries: Sequence[Sequence[Entry]]) -> Iterator[None]:
    """While inside, the entries of adapter k are in slot k; an adapter without any (kind head) adds nothing."""
    sites = tail.encoder.sites
    try:
        for slot, own in enumerate(entries):
            if own:
                sites.put(slot, own)
        yield
    finally:
        for slot in range(len(entries)):
            sites.drop(slot)


def mixes(weights: Tensor, reach: Tensor | None = None) -> list[Mix]:
    """One mix per task from weights (T, K, num_layers): learned where they require gradients.

    reach: (T, K) False where a weight is zero and has no gradient, so that nothing needs to be computed for it.
    """
    if not weights.requires_grad:
        slots = tuple(range(weights.shape[1]))
        return [Mix(slots, row.detach().float().numpy()) for row in weights]
    at_hand = torch.ones(weights.shape[:2], dtype=torch.bool) if reach is None else reach
    within = [of_task.nonzero().flatten() for of_task in at_hand]
    return [Mix(tuple(slots.tolist()), row[slots]) for row, slots in zip(weights, within, strict=True)]


def one_hot(num_tasks: int, num_layers: int) -> Tensor:
    """(T, T, num_layers) each task its own module."""
    return torch.eye(num_tasks)[:, :, None].expand(-1, -1, num_layers).contiguous()


def uniform(num_tasks: int, num_modules: int, num_layers: int, mass: float = 1.0) -> Tensor:
    """(T, K, num_layers) all modules alike, summing to mass at each layer."""
    return torch.full((num_tasks, num_modules, num_layers), mass / num_modules)


def _detached(entry: Entry) -> Entry:
    return Entry(entry.site, entry.primitive, {n: t.detach().clone() for n, t in entry.tensors.items()}, entry.options)
