"""Entries of every primitive and batches of random mixes, as plain functions and as Hypothesis strategies over them.

A strategy draws what may be odd (ranks, options, which tensors); the numbers themselves come from a generator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adapters_store.mixing import Mix
from adapters_store.primitives import Entry, Place
from adapters_store.primitives.bottleneck import ACTIVATIONS
from adapters_store.sites import Sites

light = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
EntryMaker = Callable[[Place, torch.Generator], Entry]


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def lowrank(place: Place, generator: torch.Generator, rank: int = 4, scale: float = 0.5) -> Entry:
    A = randn(generator, rank, place.d_in) / place.d_in**0.5
    B = randn(generator, place.d_out, rank) / rank**0.5
    return Entry(place.name, "lowrank", {"A": A, "B": B}, {"scale": scale})


def scale_shift(
    place: Place, generator: torch.Generator, parts: Sequence[str] = ("scale", "shift"), size: float = 0.3
) -> Entry:
    tensors = {"scale": 1 + size * randn(generator, place.d_out), "shift": size * randn(generator, place.d_out)}
    return Entry(place.name, "scale_shift", {name: tensors[name] for name in parts})


def norm(place: Place, generator: torch.Generator, with_bias: bool = True, size: float = 0.3) -> Entry:
    weight, bias = place.module.weight, getattr(place.module, "bias", None)
    tensors = {"weight": weight.detach().float() + size * randn(generator, place.d_out)}
    if bias is not None and with_bias:
        tensors["bias"] = bias.detach().float() + size * randn(generator, place.d_out)
    return Entry(place.name, "norm", tensors)


def bottleneck(
    place: Place,
    generator: torch.Generator,
    rank: int = 4,
    activation: str = "relu",
    source: str = "x",
    biases: Sequence[str] = ("down_bias", "up_bias"),
    scale: float = 0.5,
) -> Entry:
    width = place.d_in if source == "x" else place.d_out
    tensors = {
        "down": randn(generator, rank, width) / width**0.5,
        "up": randn(generator, place.d_out, rank) / rank**0.5,
    }
    sizes = {"down_bias": rank, "up_bias": place.d_out}
    tensors |= {name: 0.3 * randn(generator, sizes[name]) for name in biases}
    return Entry(place.name, "bottleneck", tensors, {"activation": activation, "input": source, "scale": scale})


def _bound(function: Callable[..., Entry], **drawn: st.SearchStrategy) -> st.SearchStrategy[EntryMaker]:
    def with_choices(choices: dict) -> EntryMaker:
        return lambda place, generator: function(place, generator, **choices)

    return st.fixed_dictionaries(drawn).map(with_choices)


_ranks = st.one_of(st.sampled_from([1, 7, 8, 9, 16, 17, 64, 70]), st.integers(1, 70))
_scales = st.sampled_from([0.5, 1.0, -0.25])
# Every primitive's entries by its name; test_primitives fails for a primitive that is not here.
ENTRIES: dict[str, st.SearchStrategy[EntryMaker]] = {
    "lowrank": _bound(lowrank, rank=_ranks, scale=_scales),
    "scale_shift": _bound(scale_shift, parts=st.sampled_from([("scale",), ("shift",), ("scale", "shift")])),
    "norm": _bound(norm, with_bias=st.booleans()),
    "bottleneck": _bound(
        bottleneck,
        rank=_ranks,
        activation=st.sampled_from(sorted(ACTIVATIONS)),
        source=st.sampled_from(["x", "y"]),
        biases=st.sampled_from([(), ("down_bias",), ("up_bias",), ("down_bias", "up_bias")]),
        scale=_scales,
    ),
}

_weights = st.one_of(st.just(0.0), st.floats(-1.0, 1.0, width=32))


@st.composite
def mixes(draw: st.DrawFn, num_slots: int, num_layers: int, max_adapters: int = 8) -> Mix:
    """Some of the slots in any order, with weights per layer that may be zero or negative."""
    slots = draw(st.lists(st.integers(0, num_slots - 1), unique=True, max_size=min(max_adapters, num_slots)))
    weights = draw(st.lists(_weights, min_size=len(slots) * num_layers, max_size=len(slots) * num_layers))
    return Mix(tuple(slots), np.array(weights, np.float32).reshape(len(slots), num_layers))


@st.composite
def rows(draw: st.DrawFn, num_slots: int, num_layers: int, max_rows: int = 40) -> list[tuple[int, Mix | None]]:
    """Rows of 1 to 50 tokens that share a few mixes, or have none; an equal copy stands for a duplicate."""
    some = draw(st.lists(mixes(num_slots, num_layers), min_size=1, max_size=6))
    some.append(Mix(some[0].slots, some[0].weights.copy()))
    lengths = draw(st.lists(st.one_of(st.integers(1, 50), st.just(16)), min_size=1, max_size=max_rows))
    chosen = [draw(st.integers(-1, len(some) - 1)) for _ in lengths]
    return [(length, None if i < 0 else some[i]) for length, i in zip(lengths, chosen, strict=True)]


@dataclass(frozen=True)
class OneSite:
    """A backbone of three layers of which one is under test, so that weights per layer matter."""

    sites: Sites
    place: Place

    @staticmethod
    def of(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> "OneSite":
        layers = nn.ModuleList([nn.ModuleDict({"site": make()}) for _ in range(3)])
        backbone = nn.ModuleDict({"layers": layers}).to(dtype).requires_grad_(False)
        sites = Sites(backbone, 0, keeps_reference=True)
        return OneSite(sites, sites["layers.1.site"].place)
