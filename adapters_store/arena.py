"""Memory for what tapes compute (tape.py), and who lies where in it."""

import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from adapters_store import memory

_LINE = 64  # bytes; everything begins at a line of the cache


class Arena:
    """Memory for what tapes compute. Tapes share it, so only one of them is of use at a time."""

    def __init__(self, nbytes: int) -> None:
        with memory.side_by_side(nbytes):
            self.bytes = memory.zeros(nbytes, dtype=torch.uint8)  # costs nothing until it is used
        self.start = self.bytes.data_ptr()
        self._typed: dict[torch.dtype, Tensor] = {}

    def holds(self, tensor: Tensor) -> bool:
        """True if the tensor lies here."""
        return self.start <= tensor.data_ptr() < self.start + len(self.bytes)

    def standing(self, tensor: Tensor) -> Tensor:
        """The same numbers in the same place, as a tensor that does not keep the place from being used again."""
        if not self.holds(tensor):
            return tensor
        if tensor.dtype not in self._typed:
            self._typed[tensor.dtype] = self.bytes.view(tensor.dtype)
        start = (tensor.data_ptr() - self.start) // tensor.element_size()
        return self._typed[tensor.dtype].as_strided(tensor.shape, tensor.stride(), start)


class Room:
    """Who lies where in an arena during one recording: what dies gives its place to the next of its size."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._numpy = arena.bytes.numpy()
        self._free: dict[int, list[int]] = defaultdict(list)
        self._end = 0

    def like(self, tensor: Tensor) -> Tensor | None:
        """A tensor of the same shape, dtype and order of dimensions; None if there is no room."""
        if not tensor.numel():
            return tensor
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        nbytes = -(-extent * tensor.element_size() // _LINE) * _LINE
        start = self._free[nbytes].pop() if self._free[nbytes] else self._end
        if start + nbytes > len(self._numpy):
            return None
        self._end = max(self._end, start + nbytes)
        place: np.ndarray = self._numpy[start : start + nbytes]
        weakref.finalize(place, self._free[nbytes].append, start).atexit = False  # when no view of it is left
        return torch.from_numpy(place).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
