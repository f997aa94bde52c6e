"""Packing: rows of different lengths as one sequence of tokens, so that cost follows the fill and not the padding.

A packed forward gets input_ids (1, tokens) with rows side by side. All that mixes tokens is attention, so the
attention function is the one part that must know where rows begin; it is registered with the model library under the
name PACKED and reads the current row lengths from here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKED = "espalier_packed"
_runs: ContextVar[tuple[tuple[int, int, int], ...] | None] = ContextVar("runs", default=None)
_bands: ContextVar[dict[tuple[int, int, bool], Tensor]] = ContextVar("bands")  # this batch's masks, see _band


def runs_of(lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """(start, rows, length) of each run of neighbouring rows of equal length."""
    runs, start = [], 0
    for length, group in groupby(lengths):
        rows = len(list(group))
        runs.append((start, rows, length))
        start += rows * length
    return tuple(runs)


@contextmanager
def packed(lengths: Sequence[int]) -> Iterator[None]:
    """While inside, packed attention works on rows of these lengths."""
    runs, bands = _runs.set(runs_of(lengths)), _bands.set({})
    try:
        yield
    finally:
        _runs.reset(runs)
        _bands.reset(bands)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  # rows are told apart by their lengths
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001  # a frozen backbone has none
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of each row to itself. query: (1, heads, tokens, d); key, value: (1, kv_heads, tokens, d).

    Returns (1, tokens, heads, d). Raises ValueError for what it does not do (soft caps, sinks, biases by position), so
    that the encoder falls back to padding instead of being silently wrong.
    """
    runs = _runs.get()
    if runs is None:
        raise ValueError("packed attention outside of packing.packed()")
    _refuse(options)
    causal = bool(options.get("is_causal", getattr(module, "is_causal", False)))
    pieces = []
    sizes = [rows * length for _, rows, length in runs]  # split, not sliced: one gradient buffer instead of one per run
    parts = zip(*(torch.split(tensor[0], sizes, dim=1) for tensor in (query, key, value)), strict=True)
    for (_, rows, length), part in zip(runs, parts, strict=True):
        q, k, v = (_rows(run, rows, length) for run in part)
        band = _band(length, options.get("sliding_window"), causal, query.device)
        if band is None and not causal and _prefers_products(q, k):
            mixed = _two_sided(q, k, v, scaling)
        else:
            plain = causal and length > 1 and band is None
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=band, is_causal=plain, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        pieces.append(mixed.transpose(1, 2).reshape(1, rows * length, *mixed.shape[1:2], mixed.shape[-1]))
    return torch.cat(pieces, dim=1), None


def _rows(run: Tensor, rows: int, length: int) -> Tensor:
    """(rows, heads, length, d) view of a run (heads, rows * length, d)."""
    return run.reshape(run.shape[0], rows, length, run.shape[-1]).transpose(0, 1)


def _prefers_products(q: Tensor, k: Tensor) -> bool:
    """True where two plain products beat the fused kernel: bfloat16 on the CPU, where it takes about twice as long."""
    rows, heads, length, _ = q.shape
    return (
        q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and rows * length >= 128
        and heads == k.shape[1]
        and length <= 512
    )


def _two_sided(q: Tensor, k: Tensor, v: Tensor, scaling: float | None) -> Tensor:
    """softmax(scaling q k^T) v as two batched products. All (rows, heads, length, d)."""
    shape, flat = q.shape, (q.shape[0] * q.shape[1], q.shape[2], q.shape[3])
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    # The scale goes inside the product, where sums are still float32.
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), q.reshape(flat), k.reshape(flat).mT, beta=0, alpha=scale)
    return torch.bmm(torch.softmax(scores, dim=-1), v.reshape(flat)).view(shape)


def _band(length: int, window: int | None, causal: bool, device: torch.device) -> Tensor | None:
    """(length, length) True where a token looks: less than a window away and, if causal, not ahead.

    None if the window reaches over the whole row. The model library passes the window with this meaning to every
    attention function, for two-sided windows too (ModernBERT: half of local_attention, plus one).
    """
    if window is None or window >= length:
        return None
    bands, key = _bands.get(), (length, window, causal)
    if key not in bands:
        at = torch.arange(length, device=device)
        apart = at[:, None] - at
        bands[key] = (apart >= 0) & (apart < window) if causal else apart.abs() < window
    return bands[key]


def _refuse(options: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"packed attention does not do {name}")


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask function registered with PACKED: packed attention needs none."""
