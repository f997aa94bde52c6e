"""The forward of families without the attention interface (Bloom, Falcon, GPT-J …): padded, over the same pages.

Rows of one forward have equally many new tokens and stand right-aligned: [padding, past, new]. The model builds its own
masks and position biases from the attention mask, as it does for left-padded batches in `generate`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from server.generation.attention import KVMemory, gathered, store
from server.generation.pages import PAGE
from server.generation.plan import Chunk


class PagedCache(Cache):  # type: ignore[misc]  # the library is untyped
    """Keys and values of some rows for one forward, read from pages and written to them."""

    def __init__(self, memory: KVMemory, chunks: list[Chunk]) -> None:
        super().__init__(layers=[])
        self._memory, self._chunks = memory, chunks
        self._count = chunks[0].count
        self._length = max(chunk.end for chunk in chunks)
        device = memory.device
        self._tables = [torch.tensor(chunk.sequence.pages, device=device) for chunk in chunks]
        self._places = torch.cat([self._places_of(i) for i in range(len(chunks))])

    def _places_of(self, row: int) -> Tensor:
        chunk = self._chunks[row]
        at = torch.arange(chunk.past, chunk.end, device=self._memory.device)
        return self._tables[row][at // PAGE] * PAGE + at % PAGE

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keep the new states (rows, kv_heads, count, d); give those of whole rows (rows, kv_heads, length, d)."""
        layer = self._memory.layer(layer_idx, key_states[0], value_states[0])
        for pages, new in zip(layer, (key_states, value_states), strict=True):
            store(pages, new.transpose(0, 1).flatten(1, 2), self._places)
        return tuple(torch.stack([self._aligned(pages, i) for i in range(len(self._chunks))]) for pages in layer)

    def _aligned(self, pages: Tensor, row: int) -> Tensor:
        """(kv_heads, length, d) of one row, zeros before its first token."""
        end = self._chunks[row].end
        found = gathered(pages, self._tables[row])[:, :end]
        return torch.nn.functional.pad(found, (0, 0, self._length - end, 0))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before the new tokens."""
        return self._length - self._count

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns in all, and where they begin."""
        return self._length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Column of the first new token."""
        return self._length - self._count

    @property
    def attention_mask(self) -> Tensor:
        """(rows, length) 1 where a row has a token."""
        ends = torch.tensor([chunk.end for chunk in self._chunks], device=self._memory.device)
        return (torch.arange(self._length, device=ends.device) >= self._length - ends[:, None]).long()

    @property
    def position_ids(self) -> Tensor:
        """(rows, count)."""
        starts = torch.tensor([chunk.past for chunk in self._chunks], device=self._memory.device)
        return starts[:, None] + torch.arange(self._count, device=starts.device)
