# ruff: noqa: ANN001, ANN202  # a kernel's arguments are what the launch makes of them: addresses, numbers, constants
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Attention of decoding rows over pages of keys and values on a GPU, in Triton; semantics as attention.attend_rows.

One program serves the query heads that share a kv head of one row, over a span of at most SPAN tokens, with an online
softmax in float32 (FlashAttention-2, arXiv 2307.08691). Longer rows have several spans, which `_join` puts together
(split-K, as Flash-Decoding has it). Spans begin at multiples of SPAN in every row, so a row's result does not depend
on the other rows of the batch.

What a launch looks like follows the sizes of buffers, never their contents: a CUDA graph can replay it after the
buffers have been refilled. Rows of length 0 and places of -1 are idle. This file needs triton.
Checked in Triton's interpreter and compiled for sm_90; the sizes of blocks have not been tuned on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapters_store.packing import Scoring
from adapters_store.primitives.triton_lowrank import DTYPES, INTERPRETED, dot
from server.generation.pages import PAGE

SPAN = 512  # tokens of one program
MIN_GROUP = 16  # query heads of one product; the least that the hardware multiplies
UNBOUNDED = 2**30  # a window that no sequence fills


@triton.jit
def _attend(
    query, keys, values, tables, lengths, out, tops, totals, scale, softcap, window, row_stride, head_stride,
    table_stride, group, num_spans,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, SPAN: tl.constexpr, PAGE: tl.constexpr, IS_CAPPED: tl.constexpr,
    IS_JOINED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out[row, heads of a kv head (, span)] = softmax(scale q k^T) v over one span.

    IS_JOINED: out is not yet divided by the sum of weights; tops and totals keep the largest score and that sum.
    """
    row, kv_head, span = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    begin = tl.maximum(span * SPAN, length - window)
    end = tl.minimum(span * SPAN + SPAN, length)
    heads, at_d, at_v = tl.arange(0, BLOCK_GROUP)[:, None], tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    first_head = kv_head * group
    q = tl.load(
        query + row * row_stride + (first_head + heads) * head_stride + at_d[None, :],
        mask=(heads < group) & (at_d[None, :] < D), other=0.0,
    )  # fmt: skip
    top = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_GROUP,), tl.float32)
    acc = tl.zeros((BLOCK_GROUP, BLOCK_V), tl.float32)
    # every block of the loop has a token that is seen, so `top` is finite from the first on
    for block in range(begin // BLOCK_TOKENS, tl.where(begin < end, tl.cdiv(end, BLOCK_TOKENS), 0)):
        at = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        seen = (at >= begin) & (at < end)
        page = tl.load(tables + row * table_stride + at // PAGE, mask=seen, other=0)
        place = (page * tl.num_programs(1) + kv_head) * PAGE + at % PAGE  # int64, in rows of d or d_v numbers
        k = tl.load(
            keys + place[None, :] * D + at_d[:, None], mask=seen[None, :] & (at_d[:, None] < D), other=0.0
        )  # (d, tokens)
        v = tl.load(
            values + place[:, None] * D_V + at_v[None, :], mask=seen[:, None] & (at_v[None, :] < D_V), other=0.0
        )
        scores = dot(q, k, tl.zeros((BLOCK_GROUP, BLOCK_TOKENS), tl.float32), WIDE) * scale
        if IS_CAPPED:
            scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))  # softcap * tanh(scores / softcap)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - new_top[:, None])
        shrunk = tl.exp(top - new_top)
        total = total * shrunk + tl.sum(weights, 1)
        acc = dot(weights.to(v.dtype), v, acc * shrunk[:, None], WIDE)
        top = new_top
    num_heads = tl.num_programs(1) * group
    is_own = (heads < group) & (at_v[None, :] < D_V)
    if IS_JOINED:
        if begin < end:  # others are not read
            place = (row * num_heads + first_head + heads) * num_spans + span
            tl.store(out + place * D_V + at_v[None, :], acc, mask=is_own)
            flat = (row * num_heads + first_head + tl.arange(0, BLOCK_GROUP)) * num_spans + span
            tl.store(tops + flat, top, mask=tl.arange(0, BLOCK_GROUP) < group)
            tl.store(totals + flat, total, mask=tl.arange(0, BLOCK_GROUP) < group)
    else:
        total = tl.where(total > 0, total, 1.0)
        mixed = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + (row * num_heads + first_head + heads) * D_V + at_v[None, :], mixed, mask=is_own)


@triton.jit
def _join(
    parts, tops, totals, lengths, out, window, num_spans,
    D_V: tl.constexpr, BLOCK_V: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """out[row, head] = the mean of the spans' parts by their weights."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    first, last = tl.maximum(length - window, 0) // SPAN, tl.cdiv(length, SPAN)
    place = (row * tl.num_programs(1) + head) * num_spans
    top = tl.full((), float("-inf"), tl.float32)
    for span in range(first, last):
        top = tl.maximum(top, tl.load(tops + place + span))
    at = tl.arange(0, BLOCK_V)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_V,), tl.float32)
    for span in range(first, last):
        share = tl.exp(tl.load(tops + place + span) - top)
        total += share * tl.load(totals + place + span)
        acc += share * tl.load(parts + (place + span) * D_V + at, mask=at < D_V, other=0.0)
    total = tl.where(total > 0, total, 1.0)
    mixed = (acc / total).to(out.dtype.element_ty)
    tl.store(out + (row * tl.num_programs(1) + head) * D_V + at, mixed, mask=at < D_V)


@triton.jit
def _append(
    key, value, keys, values, places, key_head, key_token, value_head, value_token,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Write the key and the value of one token and kv head to the token's place; a place of -1 is nowhere."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.load(places + token)
    if place >= 0:
        row, at = (place // PAGE * tl.num_programs(1) + head) * PAGE + place % PAGE, tl.arange(0, BLOCK)
        k = tl.load(key + head * key_head + token * key_token + at, mask=at < D, other=0.0)
        tl.store(keys + row * D + at, k.to(keys.dtype.element_ty), mask=at < D)
        v = tl.load(value + head * value_head + token * value_token + at, mask=at < D_V, other=0.0)
        tl.store(values + row * D_V + at, v.to(values.dtype.element_ty), mask=at < D_V)


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """True if the kernels can attend over pages of this dtype on this device."""
    return dtype in DTYPES and (device.type == "cuda" or INTERPRETED)


def attend(query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scoring: Scoring) -> Tensor:
    """Each new token's attention to its own sequence; its own key and value are in pages already.

    query: (rows, heads, d), unit stride in the last dimension; keys: (pages, kv_heads, PAGE, d) and values likewise
    with d_v, contiguous; tables: (rows, most pages) int64; lengths: (rows,) int64 with the new token, 0 for an idle
    row, which gives zeros. Returns (rows, heads, d_v).
    """
    (rows, heads, d), (_, kv_heads, _, d_v) = query.shape, values.shape
    if not rows:
        return query.new_empty(0, heads, d_v)
    assert query.stride(2) == 1 == tables.stride(1), "our bug: rows of queries and tables are contiguous"
    group, num_spans = heads // kv_heads, max(1, triton.cdiv(tables.shape[1] * PAGE, SPAN))
    window = min(scoring.window or UNBOUNDED, UNBOUNDED)
    out = query.new_empty(rows, heads, d_v)
    is_joined = num_spans > 1
    parts = query.new_empty(rows, heads, num_spans, d_v, dtype=torch.float32) if is_joined else out
    tops, totals = query.new_empty(2, rows, heads, num_spans, dtype=torch.float32)
    _attend[(rows, kv_heads, num_spans)](
        query, keys, values, tables, lengths, parts, tops, totals, scoring.scale, scoring.softcap or 1.0, window,
        query.stride(0), query.stride(1), tables.stride(0), group, num_spans,
        D=d, D_V=d_v, BLOCK_GROUP=max(MIN_GROUP, triton.next_power_of_2(group)), BLOCK_D=padded(d), BLOCK_V=padded(d_v),
        BLOCK_TOKENS=tokens_of_block(max(d, d_v), query.element_size()), SPAN=SPAN, PAGE=PAGE,
        IS_CAPPED=scoring.softcap is not None, IS_JOINED=is_joined, WIDE=INTERPRETED, num_stages=2,
    )  # fmt: skip
    if is_joined:
        _join[(rows, heads)](
            parts, tops, totals, lengths, out, window, num_spans, D_V=d_v, BLOCK_V=padded(d_v), SPAN=SPAN
        )
    return out


def append(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> None:
    """Write new keys (kv_heads, tokens, d) and values (kv_heads, tokens, d_v) into pages at places (tokens,) int64.

    Unit stride in the last dimension of key and value; a place is page * PAGE + place in it, -1 for nowhere.
    """
    assert key.stride(2) == 1 == value.stride(2), "our bug: heads of keys and values are contiguous"
    (kv_heads, tokens, d), d_v = key.shape, value.shape[2]
    _append[(tokens, kv_heads)](
        key, value, keys, values, places, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        D=d, D_V=d_v, BLOCK=padded(max(d, d_v)), PAGE=PAGE,
    )  # fmt: skip


def padded(width: int) -> int:
    """Numbers of a block that holds so many: a power of two that the hardware multiplies."""
    power: int = triton.next_power_of_2(width)
    return max(16, power)


def tokens_of_block(width: int, itemsize: int) -> int:
    """Tokens whose keys and values are read at once: as many as leave room for two programs in shared memory."""
    return max(16, min(64, 16384 // (padded(width) * itemsize)))
