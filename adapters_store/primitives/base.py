"""What every primitive is: a delta added to the output of one place in the backbone.

A primitive brings
- a check of its tensors against the place (`check`),
- the slow reference `delta`: one adapter, some tokens; this is the specification,
- a `Bank`: the adapters resident at one place by slot, and `add`: the same for a whole mixed batch at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapters_store.errors import KeysError, ShapeError
from adapters_store.mixing import MixedBatch

Options = Mapping[str, float | int | str | bool]


@dataclass(frozen=True)
class Entry:
    """One adapter at one site: a primitive, its tensors by the primitive's own names, and its options."""

    site: str
    primitive: str
    tensors: Mapping[str, Tensor]
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """What a primitive may know of where it sits. d_in, d_out: widths of the module's input and output."""

    name: str
    module: nn.Module
    d_in: int
    d_out: int
    layer: int


class Bank(ABC):
    """The adapters resident at one place for one primitive, by slot."""

    def __init__(self, place: Place, dtype: torch.dtype, device: torch.device) -> None:
        self.place = place
        self.dtype = dtype
        self.device = device
        self.slots: dict[int, Any] = {}

    def put(self, slot: int, entry: Entry) -> None:
        """Make the entry resident. Its tensors are used as they are if they require gradients."""
        self.slots[slot] = self.prepare(entry)
        self.changed(slot)

    def drop(self, slot: int) -> None:
        """Forget a slot; nothing of it stays behind."""
        if self.slots.pop(slot, None) is not None:
            self.changed(slot)

    def changed(self, slot: int) -> None:  # noqa: B027  # most banks keep no table that could fall behind
        """Called after a slot was filled or emptied."""

    @abstractmethod
    def prepare(self, entry: Entry) -> Any:
        """What is kept of an entry."""

    @abstractmethod
    def add(self, out: Tensor, x: Tensor, y: Tensor, batch: MixedBatch) -> Tensor:
        """Give out + sum over the mix of each token of weight * delta(x, y).

        out, y: (tokens, d_out); x: (tokens, d_in). y is the backbone's own output. `out` may be changed in place when
        no gradients are recorded; y is not changed unless it is `out`.
        """

    def serves(self, batch: MixedBatch) -> bool:
        """True if the batch has a slot that has something here; costs the fewer of active and resident slots."""
        return not self.slots.keys().isdisjoint(batch.active)

    def chosen(self, batch: MixedBatch) -> tuple[int, ...]:
        """Slots of the batch that have something here, in order."""
        return tuple(slot for slot in batch.slots.tolist() if slot in self.slots)


@dataclass(frozen=True)
class Primitive:
    """A primitive's parts under its name. The server knows these and nothing else of a method."""

    name: str
    check: Callable[[Place, Entry], None]
    delta: Callable[[Place, Entry, Tensor, Tensor], Tensor]
    bank: type[Bank]


def add_at(out: Tensor, tokens: Tensor | None, delta: Tensor) -> Tensor:
    """Give out with delta added at these tokens (None: all); other rows keep their bits."""
    delta = delta.to(out.dtype)
    if torch.is_grad_enabled() and (delta.requires_grad or out.requires_grad):
        return out + delta if tokens is None else out.index_add(0, tokens, delta)
    return out.add_(delta) if tokens is None else out.index_add_(0, tokens, delta)


def pick(x: Tensor, tokens: Tensor | None) -> Tensor:
    """The rows of x at these tokens; x itself for None."""
    return x if tokens is None else x.index_select(0, tokens)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64: deltas are never computed in less."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_names(entry: Entry, required: set[str], optional: set[str], options: set[str]) -> None:
    """Refuse missing or unknown tensors and options. Raises KeysError."""
    present = set(entry.tensors)
    if not required <= present or not present <= required | optional:
        raise KeysError(
            f"{entry.primitive} at {entry.site} needs tensors {sorted(required)} and may have {sorted(optional)}; "
            f"it has {sorted(present)}"
        )
    if not set(entry.options) <= options:
        unknown = sorted(set(entry.options) - options)
        raise KeysError(f"{entry.primitive} at {entry.site} has unknown options {unknown}; known: {sorted(options)}")
    scale = entry.options.get("scale", 1.0)
    if isinstance(scale, bool | str):
        raise KeysError(f"{entry.primitive} at {entry.site}: scale must be a number, it is {scale!r}")


def rank_of(entry: Entry, name: str) -> int:
    """Rows of a matrix among the entry's tensors. Raises ShapeError if it is no matrix."""
    shape = tuple(entry.tensors[name].shape)
    if len(shape) != 2:
        raise ShapeError(f"{entry.primitive}.{name} at {entry.site} must be a matrix, it has shape {shape}")
    return shape[0]


def check_shape(entry: Entry, name: str, expected: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape. Raises ShapeError."""
    shape = tuple(entry.tensors[name].shape)
    if shape != expected:
        raise ShapeError(f"{entry.primitive}.{name} at {entry.site} must have shape {expected}, it has {shape}")
