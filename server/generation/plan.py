"""What one step computes: single tokens of decoding sequences first, then chunks of prompts; as tensors, built once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from adapters_store.mixing import Mix
from server.generation.pages import PAGE
from server.generation.sequence import TokenSequence


@dataclass(frozen=True, eq=False)
class Chunk:
    """Neighbouring tokens of one sequence: `count` of them, behind `past` that are computed already."""

    sequence: TokenSequence
    past: int
    count: int

    @property
    def end(self) -> int:
        """Tokens of the sequence that will be computed after the step."""
        return self.past + self.count

    @property
    def is_last(self) -> bool:
        """True if the next token can be chosen after it."""
        return self.end == len(self.sequence.ids)


class Plan:
    """Chunks in the order of the forward: those of one token by composition, then the longer ones."""

    def __init__(self, chunks: Sequence[Chunk], device: torch.device, *, keeps_order: bool = False) -> None:
        singles = [chunk for chunk in chunks if chunk.count == 1]
        if not keeps_order:
            singles.sort(key=_by_mix)  # neighbours under one mix share the work of reading its adapters
        self.chunks = singles + [chunk for chunk in chunks if chunk.count > 1]
        self.num_singles = len(singles)
        self.device = device

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the forward."""
        return sum(chunk.count for chunk in self.chunks)

    @property
    def is_decode(self) -> bool:
        """True if it is single tokens only, with a token to choose behind each."""
        return self.num_singles == len(self.chunks) and all(chunk.is_last for chunk in self.chunks)

    @cached_property
    def rows(self) -> list[tuple[int, Mix | None]]:
        """(tokens, mix) of runs of neighbouring tokens under one mix; longer chunks are runs of their own."""
        runs: list[tuple[int, Mix | None]] = []
        for chunk in self.chunks[: self.num_singles]:
            mix = chunk.sequence.mix
            if runs and runs[-1][1] is mix:
                runs[-1] = (runs[-1][0] + 1, mix)
            else:
                runs.append((1, mix))
        return runs + [(chunk.count, chunk.sequence.mix) for chunk in self.chunks[self.num_singles :]]

    @cached_property
    def ids(self) -> Tensor:
        """(tokens,) int64."""
        parts = [chunk.sequence.ids[chunk.past : chunk.end] for chunk in self.chunks[self.num_singles :]]
        singles = [chunk.sequence.ids[chunk.past] for chunk in self.chunks[: self.num_singles]]
        return self._tensor(singles + [token for part in parts for token in part])

    @cached_property
    def positions(self) -> Tensor:
        """(tokens,) int64 Place of each token in its sequence."""
        longer = [np.arange(chunk.past, chunk.end) for chunk in self.chunks[self.num_singles :]]
        return self._tensor(np.concatenate([self._past, *longer]))

    @cached_property
    def places(self) -> Tensor:
        """(tokens,) int64 Where each token's keys and values go: page * PAGE + place in it."""
        rows = np.arange(self.num_singles)
        singles = self._tables[rows, self._past // PAGE] * PAGE + self._past % PAGE
        return self._tensor(np.concatenate([singles, *map(_places, self.chunks[self.num_singles :])]))

    @cached_property
    def tables(self) -> Tensor:
        """(singles, most pages) int64 Pages of each single token's sequence, zeros behind them."""
        return self._tensor(self._tables)

    @cached_property
    def lengths(self) -> Tensor:
        """(singles,) int64 Keys that each single token sees, its own included."""
        return self._tensor(self._past + 1)

    @cached_property
    def choosing(self) -> list[int]:
        """Indices in the forward of the tokens behind which a new one is chosen, in the order of `chunks`."""
        ends = np.cumsum([chunk.count for chunk in self.chunks]).tolist()
        return [end - 1 for end, chunk in zip(ends, self.chunks, strict=True) if chunk.is_last]

    @property
    def takes_likeliest(self) -> bool:
        """True if every token to choose is the likeliest one, of which nobody wants to know more."""
        return all(chunk.sequence.draw.takes_likeliest for chunk in self.chunks if chunk.is_last)

    @cached_property
    def choosers(self) -> "Plan":
        """The last token of each chunk that is its sequence's last, in the order of `chunks`; of some chunk if none is.

        Their keys and values are kept again.
        """
        ending = [chunk for chunk in self.chunks if chunk.is_last] or self.chunks[-1:]
        singles = [Chunk(chunk.sequence, chunk.end - 1, 1) for chunk in ending]
        return Plan(singles, self.device, keeps_order=True)

    def pages(self, chunk: Chunk) -> Tensor:
        """(pages,) int64 Pages of a chunk's sequence up to the chunk's end; made once, every layer asks for them."""
        if chunk not in self._pages:
            self._pages[chunk] = self._tensor(chunk.sequence.pages[: -(-chunk.end // PAGE)])
        return self._pages[chunk]

    @cached_property
    def _pages(self) -> dict[Chunk, Tensor]:
        return {}

    @cached_property
    def _past(self) -> np.ndarray:
        return np.array([chunk.past for chunk in self.chunks[: self.num_singles]], np.int64)

    @cached_property
    def _tables(self) -> np.ndarray:
        held = [chunk.sequence.pages for chunk in self.chunks[: self.num_singles]]
        tables = np.zeros((len(held), max(map(len, held), default=0)), np.int64)
        for row, pages in enumerate(held):
            tables[row, : len(pages)] = pages
        return tables

    def _tensor(self, values: "np.ndarray | list[int]") -> Tensor:
        return torch.as_tensor(values, dtype=torch.int64).to(self.device)


def _by_mix(chunk: Chunk) -> tuple[tuple[int, ...], int]:
    mix = chunk.sequence.mix
    return (mix.slots, id(mix)) if mix else ((), 0)


def _places(chunk: Chunk) -> np.ndarray:
    """(count,) Where the chunk's tokens go."""
    at = np.arange(chunk.past, chunk.end)
    pages = np.array(chunk.sequence.pages, np.int64)
    return pages[at // PAGE] * PAGE + at % PAGE
