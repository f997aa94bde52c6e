"""Decode steps over tensors that stay where they are, so that a CUDA graph can replay the forward.

A step of single tokens is copied into StepBuffers, which are padded to a bucket of rows, pages and adapters per mix.
The forward over buffers of one shape is captured once and replayed from then on: a step is then one launch instead of
thousands. Without a GPU the same forward runs eagerly over the same buffers.

What a graph holds besides shapes: which sites have adapters at all, and where the tables of their addresses lie
(`Layout`). Adapters may come and go under it; when the layout changes, graphs are captured anew. Steps with adapters
other than low-rank ones are not replayed. Capturing has not been run on a GPU yet.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapters_store.mixing import MixedBatch
from adapters_store.primitives import Bank
from adapters_store.primitives.grouping import Grouping, grouped_tiles
from adapters_store.sites import Sites
from server.generation.layout import Layout
from server.generation.pages import PAGE
from server.generation.plan import Plan

LEAST_PAGES = 32  # 512 tokens: one span of the attention kernel


class Shape(NamedTuple):
    """Sizes of buffers: rows, pages of a row, adapters of a mix."""

    rows: int
    pages: int
    pairs: int

    @staticmethod
    def of(plan: Plan, batch: MixedBatch) -> "Shape":
        """The bucket of a step."""
        most_pages = max(len(chunk.sequence.pages) for chunk in plan.chunks)
        most_pairs = max((len(mix.slots) for mix in batch.mixes), default=0)
        return Shape(_rows_of(plan.num_singles), max(LEAST_PAGES, _power(most_pages)), _power(most_pairs))


def _rows_of(rows: int) -> int:
    return _power(rows) if rows <= 16 else -(-rows // 16) * 16


def _power(n: int) -> int:
    """The least power of two that is not less; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


class StepBuffers:
    """A decode step on the device. Stands in for a Plan of single tokens only.

    ids, positions, places, lengths: (rows,); tables: (rows, pages); grouping: as kernels read it. All int64 but the
    weights, in one piece of memory: a step is one copy. Rows behind the step's are idle: they compute on a page that
    no sequence holds, under no mix.
    """

    def __init__(self, shape: Shape, num_layers: int, idle_page: int, device: torch.device) -> None:
        rows, pages, pairs = self.shape = shape
        self._idle_page = idle_page
        sizes = {
            "ids": (rows,), "positions": (rows,), "places": (rows,), "lengths": (rows,), "tables": (rows, pages),
            "tiles": (rows, 4), "pair_slot": (rows * pairs,),
        }  # fmt: skip
        total = sum(int(np.prod(size)) for size in sizes.values())
        self._host = torch.zeros(total, dtype=torch.int64)
        self._all = torch.zeros(total, dtype=torch.int64, device=device)
        self._parts = {name: part.numpy() for name, part in _cut(self._host, sizes).items()}
        views = _cut(self._all, sizes)
        self.ids, self.positions, self.places = views["ids"], views["positions"], views["places"]
        self.lengths, self.tables = views["lengths"], views["tables"]
        weights = torch.zeros(num_layers, rows * pairs, device=device)
        self.grouping = Grouping(views["tiles"], views["pair_slot"], weights, pairs)
        self.num_singles = self.num_tokens = rows
        self.chunks: tuple[()] = ()
        self._batch: MixedBatch | None = None

    def load(self, plan: Plan, batch: MixedBatch) -> None:
        """Make this step the buffers' content. batch: of the plan's rows."""
        if batch is not self._batch:
            self._load_mixes(batch)
        here, parts, n = Plan(plan.chunks, torch.device("cpu")), self._parts, plan.num_singles
        parts["ids"][n:] = parts["positions"][n:] = 0
        parts["places"][n:], parts["lengths"][n:] = self._idle_page * PAGE, 1
        parts["tables"][:] = self._idle_page
        for name in ("ids", "positions", "places", "lengths"):
            parts[name][:n] = getattr(here, name)
        parts["tables"][:n, : here.tables.shape[1]] = here.tables
        self._all.copy_(self._host)

    def _load_mixes(self, batch: MixedBatch) -> None:
        tiles, slots = self._parts["tiles"], self._parts["pair_slot"]
        tiles[:] = 0
        if batch.mixes:
            own = grouped_tiles(batch)
            tiles[: len(own)] = own
            slots[: len(batch.pair_slot)] = batch.pair_slot
            self.grouping.weights[:, : len(batch.pair_slot)] = batch.pair_weight
        self._batch = batch


def _cut(flat: Tensor, sizes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Views of these shapes, one behind the other."""
    parts = torch.split(flat, [int(np.prod(size)) for size in sizes.values()])
    return {name: part.view(size) for (name, size), part in zip(sizes.items(), parts, strict=True)}


def _grouped(bank: Bank) -> Any:
    """The bank's table of addresses on the device, if kernels serve all that is resident in it."""
    return getattr(bank, "grouped", None)


Forward = Callable[[StepBuffers, MixedBatch], Tensor]  # gives (rows, vocab_size) logits


class GraphedDecode:
    """The forward of decode steps over buffers, captured once per shape."""

    def __init__(self, forward: Forward, sites: Sites, *, idle_page: int, captures: bool) -> None:
        """idle_page: a page of KV memory that no sequence gets. captures: False to run eagerly, without a GPU."""
        self._forward, self._sites, self._idle_page, self._captures = forward, sites, idle_page, captures
        self._layout: Layout | None = None
        self._buffers: dict[Shape, StepBuffers] = {}
        self._captured: dict[Shape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None  # memory that graphs share
        self.failure: str | None = None  # why steps are not replayed, if the model's forward cannot be captured

    @torch.no_grad()
    def logits(self, plan: Plan, batch: MixedBatch) -> Tensor | None:
        """(singles, vocab_size) behind each token of the plan; None if this step must run the usual way.

        What is returned is overwritten by the next step of this shape.
        """
        if self.failure or not plan.chunks or plan.num_singles != len(plan.chunks):
            return None
        layout = Layout.of(self._sites, _grouped)
        if not layout.serves(batch):
            return None
        shape = Shape.of(plan, batch)
        if shape not in self._buffers:
            self._buffers[shape] = StepBuffers(shape, self._sites.num_layers, self._idle_page, self._sites.device)
        self._buffers[shape].load(plan, batch)
        found = self._replayed(shape, layout) if self._captures else self._eager(shape, layout)
        return None if found is None else found[: plan.num_singles]

    def _eager(self, shape: Shape, layout: Layout) -> Tensor:
        buffers, sites = self._buffers[shape], self._sites
        rows = MixedBatch.of([(shape.rows, None)], sites.num_layers, sites.device)
        batch = layout.standing(shape.rows, sites) if shape.pairs else rows
        batch.memo[Grouping] = buffers.grouping
        return self._forward(buffers, batch)

    def _replayed(self, shape: Shape, layout: Layout) -> Tensor | None:
        if layout != self._layout:
            self._layout = layout
            self._captured.clear()
        if shape not in self._captured:
            try:
                self._captured[shape] = self._capture(shape, layout)
            except RuntimeError as error:  # something in the model waits for the device, as some rotary embeddings do
                self.failure = str(error)
                return None
        graph, logits = self._captured[shape]
        graph.replay()
        return logits

    def _capture(self, shape: Shape, layout: Layout) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The launches of this step, and where they leave their logits."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and libraries set up outside of the graph
                self._eager(shape, layout)
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._eager(shape, layout)
        return graph, logits
