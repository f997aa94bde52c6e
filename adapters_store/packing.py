"""Packing: rows of different lengths as one sequence of tokens, so that cost follows the fill and not the padding.

A packed forward gets input_ids (1, tokens) with rows side by side. All that mixes tokens is attention, so the
attention function is the one part that must know where rows begin; it is registered with the model library under the
name PACKED and does what the current context says: attention within rows (`packed`), or whatever a caller brings
(`attending`), as generation does with its pages of keys and values.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKED = "espalier_packed"


@dataclass(frozen=True)
class Scoring:
    """How a model wants scores made. window: keys a token looks back on, itself included; None for all.

    softcap: scores become softcap * tanh(scores / softcap).
    """

    scale: float
    is_causal: bool
    window: int | None
    softcap: float | None


# (module, query (heads, tokens, d), key (kv_heads, tokens, d), value (kv_heads, tokens, d_v)) -> (tokens, heads, d_v)
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, Scoring], Tensor]
_attend: ContextVar[Attend | None] = ContextVar("attend", default=None)


def runs_of(lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """(start, rows, length) of each run of neighbouring rows of equal length."""
    runs, start = [], 0
    for length, group in groupby(lengths):
        rows = len(list(group))
        runs.append((start, rows, length))
        start += rows * length
    return tuple(runs)


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """While inside, packed attention is this function."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


@contextmanager
def packed(lengths: Sequence[int]) -> Iterator[set[int]]:
    """While inside, packed attention works within rows of these lengths; the windows that it was told of so far."""
    within = _WithinRows(lengths)
    with attending(within):
        yield within.windows


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
    """The registered function. query: (1, heads, tokens, d); key, value: (1, kv_heads, tokens, d).

    Returns (1, tokens, heads, d). Raises ValueError for what it does not do (sinks, biases by position), so that the
    encoder falls back to padding instead of being silently wrong.
    """
    attend = _attend.get()
    if attend is None:
        raise ValueError("packed attention outside of packing.packed() or attending()")
    for name in ("s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"packed attention does not do {name}")
    scoring = Scoring(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        bool(options.get("is_causal", getattr(module, "is_causal", False))),
        options.get("sliding_window"),
        options.get("softcap"),
    )
    return attend(module, query[0], key[0], value[0], scoring)[None], None


class _WithinRows:
    """Attention of each row to itself."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._runs = runs_of(lengths)
        self._sizes = [rows * length for _, rows, length in self._runs]
        self._bands: dict[tuple[int, int | None, bool], Tensor] = {}  # this batch's masks
        self.windows: set[int] = set()

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """See Attend."""
        if scoring.window is not None:
            self.windows.add(scoring.window)
        # split, not sliced: one gradient buffer instead of one per run
        parts = zip(*(torch.split(tensor, self._sizes, dim=1) for tensor in (query, key, value)), strict=True)
        pieces = []
        for (_, rows, length), part in zip(self._runs, parts, strict=True):
            q, k, v = (_rows(run, rows, length) for run in part)
            mixed = self._run(q, k, v, scoring)
            pieces.append(mixed.transpose(1, 2).reshape(rows * length, mixed.shape[1], mixed.shape[-1]))
        return torch.cat(pieces)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Rows of equal length. q: (rows, heads, length, d); returns the same shape."""
        length = q.shape[2]
        band = self._band(length, scoring, q.device)
        if scoring.softcap is not None:
            return capped(q, k, v, self._band(length, scoring, q.device, always=True), scoring)
        if band is None and not scoring.is_causal and _prefers_products(q, k):
            return _two_sided(q, k, v, scoring.scale)
        plain = scoring.is_causal and length > 1 and band is None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=plain, scale=scoring.scale, enable_gqa=q.shape[1] != k.shape[1]
        )

    def _band(self, length: int, scoring: Scoring, device: torch.device, *, always: bool = False) -> Tensor | None:
        """(length, length) True where a token looks: less than a window away and, if causal, not ahead.

        None if the window reaches over the whole row, unless it is wanted always. The model library passes the window
        with this meaning to every attention function, for two-sided windows too (ModernBERT: half of local_attention,
        plus one).
        """
        window = scoring.window
        if not always and (window is None or window >= length):
            return None
        key = (length, window, scoring.is_causal)
        if key not in self._bands:
            at = torch.arange(length, device=device)
            apart = at[:, None] - at
            near = apart.abs() < (window or length)
            self._bands[key] = near & (apart >= 0) if scoring.is_causal else near
        return self._bands[key]


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """Attention with a soft cap on scores, in float32, as Gemma 2 has it (arXiv 2408.00118, 2).

    q: (…, heads, queries, d); k, v: (…, kv_heads, keys, d); mask: (queries, keys), True where a query looks.
    """
    cap, groups = scoring.softcap, q.shape[-3] // k.shape[-3]
    if cap is None:
        raise AssertionError("our bug: capped attention without a cap")
    k, v = (part.repeat_interleave(groups, dim=-3) if groups > 1 else part for part in (k, v))
    scores = cap * torch.tanh((q @ k.mT) * (scoring.scale / cap))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v


def _rows(run: Tensor, rows: int, length: int) -> Tensor:
    """(rows, heads, length, d) view of a run (heads, rows * length, d)."""
    return run.reshape(run.shape[0], rows, length, run.shape[-1]).transpose(0, 1)


def _prefers_products(q: Tensor, k: Tensor) -> bool:
    """True where two plain products beat the fused kernel: bfloat16 on the CPU, where it takes about twice as long."""
    rows, heads, length, _ = q.shape
    return (
        q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and (rows * length >= 128 or q.requires_grad)
        and heads == k.shape[1]
        and length <= 512
    )


def _two_sided(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v as two batched products. All (rows, heads, length, d)."""
    shape, flat = q.shape, (q.shape[0] * q.shape[1], q.shape[2], q.shape[3])
    # The scale goes inside the product, where sums are still float32.
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), q.reshape(flat), k.reshape(flat).mT, beta=0, alpha=scale)
    return torch.bmm(torch.softmax(scores, dim=-1), v.reshape(flat)).view(shape)


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask function registered with PACKED: packed attention needs none."""
