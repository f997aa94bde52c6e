"""Attention over pages of keys and values: the function that the backbone's layers call while a step runs.

Single tokens of decoding sequences go through one call for all of them: a native kernel on the CPU
(native_attention.py), Triton's on a GPU (triton_attention.py); without them `attend_rows`, which is the specification,
and `attend_padded` on other devices. Longer chunks of prompts go one by one: through a native kernel on the CPU, else
through torch's fused attention (`attend_chunk`, the specification) over their sequence's pages gathered.
"""

import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters_store import memory
from adapters_store.packing import Scoring, capped
from server.generation import native_attention
from server.generation.pages import PAGE
from server.generation.plan import Chunk, Plan


class KVMemory:
    """Keys and values of every layer in pages; a layer's tensors are made when it is first written to.

    Memory that is not written to costs nothing on most systems: it is zeros that were never touched. On the CPU it is
    in huge pages where the system gives them (memory.py).
    """

    def __init__(self, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_pages, self.dtype, self.device = num_pages, dtype, device
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (pages, kv_heads, PAGE, d) and values (pages, kv_heads, PAGE, d_v) of a layer.

        key: (kv_heads, …, d) and value: (kv_heads, …, d_v) tell the shapes.
        """
        if index not in self.layers:
            self.layers[index] = (self._pages(key), self._pages(value))
        return self.layers[index]

    def _pages(self, like: Tensor) -> Tensor:
        shape = (self.num_pages + 1, like.shape[0], PAGE, like.shape[-1])  # the last: see idle_page
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        with memory.side_by_side(math.prod(shape) * self.dtype.itemsize):
            return memory.zeros(*shape, dtype=self.dtype)

    def resized(self, num_pages: int) -> "KVMemory":
        """Empty memory of so many pages for the same layers."""
        resized = KVMemory(num_pages, self.dtype, self.device)
        for index, (keys, values) in self.layers.items():
            resized.layer(index, keys[0], values[0])
        return resized

    @property
    def idle_page(self) -> int:
        """A page that no sequence gets: idle rows of a captured step write there."""
        return self.num_pages

    @property
    def page_bytes(self) -> int:
        """Memory of one page, in all layers."""
        return sum(part[0].nbytes for layer in self.layers.values() for part in layer)


class KeptError(Exception):
    """Keys and values are kept, and nothing else was wanted."""


class PagedAttention:
    """What packing.attending runs during one step. plan: of the tokens that come; may change between layers."""

    def __init__(self, memory: KVMemory, plan: Plan) -> None:
        self._memory, self.plan = memory, plan
        self._is_keeping = False

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """While inside, keys and values are kept, and the forward ends there with KeptError."""
        self._is_keeping = True
        try:
            yield
        finally:
            self._is_keeping = False

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """See packing.Attend; the new keys and values are kept."""
        layer: Any = module.layer_idx
        keys, values = self._memory.layer(int(layer), key, value)
        if self._is_keeping:
            self._keep(key, value, keys, values, 0)
            raise KeptError
        start = self.plan.num_singles
        pieces = [self._singles(query[:, :start], key, value, keys, values, scoring)]
        for chunk in self.plan.chunks[start:]:
            tokens = slice(start, start + chunk.count)
            new = query[:, tokens], key[:, tokens], value[:, tokens]
            pieces.append(self._chunk(chunk, *new, keys, values, scoring))
            start += chunk.count
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _singles(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, scoring: Scoring
    ) -> Tensor:
        """Keep all new keys and values; (singles, heads, d_v) of the tokens that are alone in their chunks."""
        plan, start = self.plan, self.plan.num_singles
        kernels = _gpu_kernels(keys.dtype, keys.device)
        is_native = not kernels and native_attention.supports(keys.dtype, keys.device)
        if not is_native or start < plan.num_tokens:
            self._keep(key, value, keys, values, start if is_native else 0)
        if kernels:
            mixed: Tensor = kernels.attend(query.transpose(0, 1), keys, values, plan.tables, plan.lengths, scoring)
            return mixed
        if not is_native:
            attend = attend_rows if keys.device.type == "cpu" else attend_padded
            return attend(query.transpose(0, 1), keys, values, plan.tables, plan.lengths, scoring)
        return native_attention.decode(  # keeps theirs itself
            query, key[:, :start], value[:, :start], keys, values, plan.tables, plan.lengths, scoring
        )

    def _keep(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, start: int) -> None:
        """Keep the keys and values of the tokens from `start` on."""
        key, value, places = key[:, start:], value[:, start:], self.plan.places[start:]
        kernels = _gpu_kernels(keys.dtype, keys.device)
        if kernels:
            kernels.append(key, value, keys, values, places)
        elif native_attention.supports(keys.dtype, keys.device):
            native_attention.append(key, value, keys, values, places)
        else:
            store(keys, key, places)
            store(values, value, places)

    def _chunk(
        self, chunk: Chunk, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, scoring: Scoring
    ) -> Tensor:
        """(count, heads, d_v) of a chunk, kept already: causal behind what its sequence had before."""
        pages = self.plan.pages(chunk)
        if native_attention.supports(keys.dtype, keys.device):
            return native_attention.prefill(query, keys, values, pages, chunk.end, scoring)
        if chunk.past:
            key, value = (gathered(part, pages)[:, : chunk.end] for part in (keys, values))
        return attend_chunk(query, key, value, scoring).transpose(0, 1)


@functools.cache
def _gpu_kernels(dtype: torch.dtype, device: torch.device) -> Any:
    """The module of kernels for a GPU where they can serve, else None."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from server.generation import triton_attention
    except ImportError:  # torch for CUDA brings triton on Linux only
        return None
    serves = triton_attention.supports(dtype, device) and _agrees(triton_attention.attend, dtype, device)
    return triton_attention if serves else None


def _agrees(attend: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """A small case against torch: what this GPU makes of the kernel must be right before it serves."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(*shape, generator=generator).to(device, dtype)
        for shape in ((3, 4, 32), (4, 2, PAGE, 32), (4, 2, PAGE, 32))
    )
    tables, lengths = torch.tensor([[0, 1], [2, 0], [3, 1]], device=device), torch.tensor([20, 3, 17], device=device)
    scoring = Scoring(32**-0.5, is_causal=True, window=None, softcap=None)
    try:
        found = attend(query, keys, values, tables, lengths, scoring)
    except Exception:  # noqa: BLE001  # no compiler, another driver: the torch form serves
        return False
    expected = attend_padded(query, keys, values, tables, lengths, scoring)
    return torch.allclose(found.float(), expected.float(), atol=1e-3 if dtype == torch.float32 else 3e-2)


def store(pages: Tensor, new: Tensor, places: Tensor) -> None:
    """Write new (kv_heads, tokens, d) into pages (pages, kv_heads, PAGE, d) at places (tokens,)."""
    pages[places // PAGE, :, places % PAGE] = new.transpose(0, 1)


def gathered(pages: Tensor, table: Tensor) -> Tensor:
    """(kv_heads, tokens, d) of the pages (n,) of one sequence, side by side."""
    found = pages.index_select(0, table)  # (n, kv_heads, PAGE, d)
    return found.transpose(0, 1).reshape(found.shape[1], -1, found.shape[-1])


def attend_chunk(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Causal attention of the last tokens of a sequence to all of it, as softmax(scale q k^T) v.

    query: (heads, count, d) of the last `count` tokens; key, value: (kv_heads, length, d). Returns (heads, count, d_v).
    """
    count, length = query.shape[1], key.shape[1]
    is_plain = count == length and (scoring.window is None or scoring.window >= length)
    mask = None if is_plain and scoring.softcap is None else _visible(count, length, scoring.window, query.device)
    if scoring.softcap is not None:
        return capped(query, key, value, mask, scoring)
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, is_causal=is_plain and count > 1, scale=scoring.scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )[0]  # fmt: skip


def _visible(count: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """(count, length) True where a token looks: not ahead, and less than a window back."""
    apart = torch.arange(length - count, length, device=device)[:, None] - torch.arange(length, device=device)
    return (apart >= 0) & (apart < (window or length))


def attend_rows(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scoring: Scoring
) -> Tensor:
    """Row by row: each new token's attention to its own sequence.

    query: (rows, heads, d); keys, values: (pages, kv_heads, PAGE, d); tables: (rows, most pages); lengths: (rows,) with
    the new token. Returns (rows, heads, d_v).
    """
    mixed = [query.new_zeros(0, query.shape[1], values.shape[-1])]
    for row, length in enumerate(lengths.tolist()):
        table = tables[row, : -(-length // PAGE)]
        key, value = (gathered(part, table)[:, :length] for part in (keys, values))
        mixed.append(attend_chunk(query[row][:, None], key, value, scoring)[None, :, 0])
    return torch.cat(mixed)


def attend_padded(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scoring: Scoring
) -> Tensor:
    """The same in one batch, all rows padded to the longest: for devices where a loop over rows costs more."""
    rows, heads, _ = query.shape
    key, value = (_gathered_rows(part, tables) for part in (keys, values))  # (rows, kv_heads, longest, d)
    at = torch.arange(key.shape[2], device=query.device)
    apart = lengths[:, None] - 1 - at  # (rows, longest)
    seen = (apart >= 0) & (apart < (scoring.window or key.shape[2]))
    unseen = ~seen[:, None, :, None]  # pages of others may hold infinity, and a weight of 0 would not hide that
    key, value = key.masked_fill(unseen, 0), value.masked_fill(unseen, 0)
    groups = query.reshape(rows, key.shape[1], heads // key.shape[1], -1)  # heads that share keys as more queries
    mask = seen[:, None, None]
    if scoring.softcap is not None:
        mixed = capped(groups, key, value, mask, scoring)
    else:
        mixed = F.scaled_dot_product_attention(groups, key, value, attn_mask=mask, scale=scoring.scale)
    return mixed.reshape(rows, heads, -1)


def _gathered_rows(pages: Tensor, tables: Tensor) -> Tensor:
    found = pages[tables]  # (rows, n, kv_heads, PAGE, d)
    return found.transpose(1, 2).reshape(found.shape[0], found.shape[2], -1, found.shape[-1])
