"""Decode steps on the CPU from tapes: what a model computes for some number of rows, recorded once and played again.

The model library's code, and ours around each layer, is the same in every decoding step; a tape is what of it computes
(adapters_store/tape.py). A step's tokens, pages and mixes are written where the tape reads them. Steps with adapters
other than low-rank ones run the usual way, and so do all steps of a model that `plays_right` finds otherwise.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapters_store.arena import Arena
from adapters_store.mixing import MixedBatch
from adapters_store.primitives import Bank, cost, native
from adapters_store.sites import Sites
from adapters_store.tape import Tape, record
from server.generation.layout import Layout
from server.generation.plan import Plan

ARENA_BYTES = 1 << 28  # for what a step makes; logits of 64 rows over 128,000 tokens are 33 MB of it
MOST = 128  # tapes that are kept


Forward = Callable[["RowBuffers", MixedBatch, bool], Tensor]  # gives what a Shape says


class Shape(NamedTuple):
    """What a tape is made for."""

    rows: int
    threads: int
    likeliest: bool  # gives the (rows,) likeliest tokens, and not the (rows, vocab_size) logits


class RowBuffers:
    """A decode step where tapes read it. Stands in for a Plan of single tokens only.

    ids, positions, places, lengths: (rows,); tables: (rows, most pages). All int64.
    """

    def __init__(self, rows: int, most_pages: int) -> None:
        names = ("ids", "positions", "places", "lengths")
        self.ids, self.positions, self.places, self.lengths = (torch.zeros(rows, dtype=torch.int64) for _ in names)
        self.tables = torch.from_numpy(np.zeros((rows, most_pages), np.int64))  # costs nothing until it is used
        self.num_singles = self.num_tokens = rows
        self.chunks: tuple[()] = ()
        self.mixes = native.Standing()

    def load(self, plan: Plan, batch: MixedBatch) -> None:
        """Make this step the buffers' content. batch: of the plan's rows."""
        for name in ("ids", "positions", "places", "lengths"):
            getattr(self, name).copy_(getattr(plan, name))
        self.tables[:, : plan.tables.shape[1]].copy_(plan.tables)
        self.mixes.load(batch)


class TapedDecode:
    """The forward of decode steps over buffers, recorded once per number of rows."""

    def __init__(self, forward: Forward, sites: Sites, *, most_pages: int) -> None:
        """most_pages: of a sequence."""
        self._forward, self._sites, self._most_pages = forward, sites, most_pages
        self._arena = Arena(ARENA_BYTES)
        self._layout: Layout | None = None
        self._layout_version = -1  # of the sites when the layout was looked at
        self._tapes: dict[Shape, tuple[RowBuffers, Tape]] = {}  # the last used one last
        self._without: dict[Shape, str] = {}  # shapes that cannot be recorded, and why
        self.num_played = 0

    def logits(self, plan: Plan, batch: MixedBatch) -> Tensor | None:
        """(singles, vocab_size) behind each token of the plan; None if this step must run the usual way.

        What is returned is overwritten by the next step.
        """
        return self._played(plan, batch, likeliest=False)

    def likeliest(self, plan: Plan, batch: MixedBatch) -> Tensor | None:
        """(singles,) likeliest token behind each token of the plan, where the model's head finds it; else the same."""
        return self._played(plan, batch, likeliest=True)

    def _played(self, plan: Plan, batch: MixedBatch, *, likeliest: bool) -> Tensor | None:
        layout = self._current_layout()
        shape = Shape(plan.num_singles, torch.get_num_threads(), likeliest)
        if not plan.chunks or shape in self._without or not layout.serves(batch) or cost.is_forced():
            return None
        known = self._tapes.pop(shape, None) or self._recorded(shape, layout)
        if isinstance(known, str):
            self._without[shape] = known
            return None
        self._tapes[shape] = known
        buffers, tape = known
        if len(self._tapes) > MOST:
            del self._tapes[next(iter(self._tapes))]
        buffers.load(plan, batch)
        self.num_played += 1
        return tape.play()

    @property
    def failure(self) -> str | None:
        """Why some steps are not played, if any cannot be recorded."""
        return next(iter(self._without.values()), None)

    def _current_layout(self) -> Layout:
        """The layout; tapes of another one are forgotten."""
        if self._layout is None or self._layout_version != self._sites.version:
            found = Layout.of(self._sites, _table)
            if found != self._layout:
                self._tapes.clear()
                self._without.clear()
            self._layout, self._layout_version = found, self._sites.version
        return self._layout

    def _recorded(self, shape: Shape, layout: Layout) -> tuple[RowBuffers, Tape] | str:
        """A tape and the buffers that it reads, or why there is none."""
        buffers, standing = RowBuffers(shape.rows, self._most_pages), layout.standing(shape.rows, self._sites)
        standing.memo.update({native.PREPARED: buffers.mixes, cost.FORM: "native"})
        tape = record(lambda: self._forward(buffers, standing, shape.likeliest), self._arena)
        return tape if isinstance(tape, str) else (buffers, tape)


def plays_right(tapes: TapedDecode, steps: Sequence[Plan], forward: Callable[[Plan], Tensor]) -> bool:
    """True if steps without mixes get the same logits from a tape as from a forward, bit for bit.

    steps: of equally many rows each, one behind the other; the first is recorded. A tape goes first, and must keep the
    keys and values that it looks at.
    """
    for step in steps:
        found = tapes.logits(step, MixedBatch.of(step.rows, 1))
        if found is None or not torch.equal(found.clone(), forward(step)):
            return False
    return tapes.num_played > 0


def _table(bank: Bank) -> native.Table | None:
    """The bank's table of addresses, if the CPU's kernel serves all that is resident in it."""
    return getattr(bank, "native", None)
