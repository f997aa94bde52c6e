"""bottleneck: delta = scale * (up f(down s + down_bias) + up_bias), with s the site's input or output.

Tensors: down (r, d), up (d_out, r), optional down_bias (r,), up_bias (d_out,). Options: activation, input ("x":
parallel, d = d_in; "y": series, d = d_out), scale. Sources: Houlsby et al. 2019 (series), He et al. 2021 (parallel),
LLM-Adapters (arXiv 2304.01933). Non-linear, so it never folds into the backbone; ranks of mixed adapters still
concatenate, because f acts on each rank by itself and weights come behind it.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from adapters_store.errors import ShapeError
from adapters_store.mixing import MixedBatch
from adapters_store.primitives import cost, two_layer
from adapters_store.primitives.base import (
    Bank,
    Entry,
    Place,
    Primitive,
    add_at,
    check_names,
    check_shape,
    pick,
    rank_of,
    wide,
)
from adapters_store.primitives.two_layer import Activation, Pair

ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda hidden: hidden,
}


def check(place: Place, entry: Entry) -> None:
    """Raises KeysError, ShapeError or NotFiniteError if the entry does not fit the place."""
    check_names(entry, {"down", "up"}, {"down_bias", "up_bias"}, {"activation", "input", "scale"})
    if entry.options.get("activation", "relu") not in ACTIVATIONS:
        raise ShapeError(f"bottleneck at {entry.site}: activation must be one of {sorted(ACTIVATIONS)}")
    if entry.options.get("input", "x") not in ("x", "y"):
        raise ShapeError(f"bottleneck at {entry.site}: input must be 'x' (parallel) or 'y' (series)")
    rank = rank_of(entry, "down")
    check_shape(entry, "down", (rank, place.d_in if _input(entry) == "x" else place.d_out))
    check_shape(entry, "up", (place.d_out, rank))
    for name, width in (("down_bias", rank), ("up_bias", place.d_out)):
        if name in entry.tensors:
            check_shape(entry, name, (width,))
    two_layer.check_fits(place, entry, [name for name in ("up", "up_bias") if name in entry.tensors])


def delta(place: Place, entry: Entry, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001  # one signature for all
    """Give scale * (up f(down s + down_bias) + up_bias). x: (tokens, d_in), y: (tokens, d_out); returns float32."""
    tensors = {name: wide(tensor) for name, tensor in entry.tensors.items()}
    source = wide(x if _input(entry) == "x" else y)
    hidden = ACTIVATIONS[_activation(entry)](F.linear(source, tensors["down"], tensors.get("down_bias")))
    return _scale(entry) * F.linear(hidden, tensors["up"], tensors.get("up_bias"))


def _input(entry: Entry) -> str:
    return str(entry.options.get("input", "x"))


def _activation(entry: Entry) -> str:
    return str(entry.options.get("activation", "relu"))


def _scale(entry: Entry) -> float:
    return float(entry.options.get("scale", 1.0))


@dataclass(frozen=True)
class _Slot:
    program: tuple[str, str]  # (input, activation): adapters that share it run together
    pair: Pair


class BottleneckBank(Bank):
    """Adapters as (down, scaled up) with biases, grouped by input and activation when a batch runs."""

    slots: dict[int, _Slot]

    def prepare(self, entry: Entry) -> _Slot:
        """Scale folded into up and up_bias in float32, then the backbone's dtype."""
        scale = _scale(entry)
        scaled = {name: t * scale if name.startswith("up") else t for name, t in entry.tensors.items()}
        kept = {name: t if t.requires_grad else t.to(self.device, self.dtype) for name, t in scaled.items()}
        pair = Pair(kept["down"], kept["up"], kept.get("down_bias"), kept.get("up_bias"))
        return _Slot((_input(entry), _activation(entry)), pair)

    def add(self, out: Tensor, x: Tensor, y: Tensor, batch: MixedBatch) -> Tensor:
        """See Bank.add."""
        programs: dict[tuple[str, str], list[int]] = defaultdict(list)
        for slot in self.chosen(batch):
            programs[self.slots[slot].program].append(slot)
        if len(programs) > 1 and out is y:
            out = y.clone()  # every program reads the backbone's own output, not the sum so far
        for (source, activation), slots in programs.items():
            selection = batch.select(tuple(slots))
            pairs = [self.slots[slot].pair for slot in slots]
            inputs = pick(x if source == "x" else y, selection.tokens)
            ranks = np.zeros(len(batch.slots), np.int64)
            ranks[np.searchsorted(batch.slots, slots)] = [pair.rank for pair in pairs]
            path = cost.cheapest(batch, ranks, inputs.shape[1], out.shape[1], x.dtype, can_native=False)
            form = two_layer.dense if path == "dense" else two_layer.fold
            delta = form(inputs, pairs, selection, self.place.layer, ACTIVATIONS[activation])
            out = add_at(out, selection.tokens, delta)
        return out


PRIMITIVE = Primitive("bottleneck", check, delta, BottleneckBank)
