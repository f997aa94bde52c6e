# ruff: noqa: ANN001, ANN201, ANN202, SIM108  # a kernel's arguments are what the launch makes of them: addresses, numbers, constants
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Low-rank deltas of a mixed batch on a GPU, in Triton: y += sum over the mix of a token of weight * B (A x).

Two kernels over tiles of at most TILE tokens under one mix. `_shrink` makes weight * A x of each (tile, adapter of its
mix); `_expand` multiplies by B, sums over the mix in registers and writes each element of y once: no atomics, and a
token's result does not depend on what else is in the batch, because how sums are split follows the widths of the site
alone. Adapters are read where they lie, through a table of addresses.

What a launch looks like follows the sizes of buffers, never their contents: a CUDA graph can replay it after the
buffers have been refilled. Tiles without tokens are idle. This file needs triton; see lowrank.py for who imports it.
Checked in Triton's interpreter and compiled for sm_90; the sizes of blocks have not been tuned on a GPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapters_store.mixing import TILE, MixedBatch
from adapters_store.primitives.grouping import Grouping
from adapters_store.primitives.two_layer import Pair

BLOCK_RANK = 16  # ranks of one product; the least that the hardware multiplies
BLOCK_IN = 128  # inputs of one product
BLOCK_OUT = 128  # outputs of one program
MAX_SPLITS = 8  # programs that share a row of A
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr):
    """Give acc + a b, summed in float32. WIDE: multiply in float32; the interpreter's bfloat16 products are wrong."""
    if WIDE:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


INTERPRETED = not isinstance(dot, triton.JITFunction)


@triton.jit(do_not_specialize=["first_weight", "room", "max_pairs"])
def _shrink(
    x, hidden, tiles, pair_slot, weights, first_weight, table, room, max_pairs, rank_room, d_in, x_stride,
    SPLITS: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_IN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """hidden[tile, pair, split] = weight * x[tile, span of the split] A[:, the same]^T, for one block of ranks."""
    tile, pair = tl.program_id(0), tl.program_id(1)
    split, block = tl.program_id(2) % SPLITS, tl.program_id(2) // SPLITS
    start, count = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1)
    first, pairs = tl.load(tiles + 4 * tile + 2), tl.load(tiles + 4 * tile + 3)
    slot = tl.load(pair_slot + first + pair, mask=pair < pairs, other=0)
    rank = tl.load(table + 3 * slot + 2, mask=(pair < pairs) & (slot < room), other=0)
    if block * BLOCK_RANK < rank:
        A = tl.multiple_of(tl.load(table + 3 * slot).to(tl.pointer_type(x.dtype.element_ty)), 16)  # in bytes
        tokens, ranks = tl.arange(0, TILE)[:, None], block * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        x_rows = x + (start + tokens) * x_stride
        A_rows = A + ranks[:, None] * d_in
        acc = tl.zeros((TILE, BLOCK_RANK), tl.float32)
        for at in range(split * SPAN, tl.minimum(split * SPAN + SPAN, d_in), BLOCK_IN):
            inputs = at + tl.arange(0, BLOCK_IN)[None, :]
            x_part = tl.load(x_rows + inputs, mask=(tokens < count) & (inputs < d_in), other=0.0)
            A_part = tl.load(A_rows + inputs, mask=(ranks[:, None] < rank) & (inputs < d_in), other=0.0)
            acc = dot(x_part, tl.trans(A_part), acc, WIDE)
        weight = tl.load(weights + first_weight + first + pair)
        rows = ((tile * max_pairs + pair) * SPLITS + split) * TILE + tokens
        tl.store(hidden + rows.to(tl.int64) * rank_room + ranks[None, :], acc * weight)


@triton.jit(do_not_specialize=["room", "max_pairs"])
def _expand(
    y, hidden, tiles, pair_slot, table, room, max_pairs, rank_room, d_out, y_stride,
    SPLITS: tl.constexpr, TILE: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_OUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y[tile, block of outputs] += sum over pairs of (sum over splits of hidden[tile, pair, split]) B^T."""
    tile = tl.program_id(0)
    start, count = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1)
    first, pairs = tl.load(tiles + 4 * tile + 2), tl.load(tiles + 4 * tile + 3)
    tokens, outputs = tl.arange(0, TILE)[:, None], tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
    acc = tl.zeros((TILE, BLOCK_OUT), tl.float32)
    ranks_in_all = count * 0
    for pair in range(pairs):
        slot = tl.load(pair_slot + first + pair)
        rank = tl.load(table + 3 * slot + 2, mask=slot < room, other=0)
        ranks_in_all += rank
        address = tl.load(table + 3 * slot + 1, mask=slot < room, other=0)
        B = tl.multiple_of(address.to(tl.pointer_type(y.dtype.element_ty)), 16)  # (rank, d_out)
        for at in range(0, rank, BLOCK_RANK):
            ranks = at + tl.arange(0, BLOCK_RANK)
            summed = tl.zeros((TILE, BLOCK_RANK), tl.float32)
            for split in tl.static_range(SPLITS):
                rows = ((tile * max_pairs + pair) * SPLITS + split) * TILE + tokens
                summed += tl.load(hidden + rows.to(tl.int64) * rank_room + ranks[None, :])
            B_part = tl.load(
                B + ranks[:, None] * d_out + outputs, mask=(ranks[:, None] < rank) & (outputs < d_out), other=0.0
            )
            acc = dot(summed.to(y.dtype.element_ty), B_part, acc, WIDE)
    if ranks_in_all > 0:  # else nothing is written: adding a zero could turn -0.0 into 0.0
        place, is_own = y + (start + tokens) * y_stride + outputs, (tokens < count) & (outputs < d_out)
        before = tl.load(place, mask=is_own, other=0.0).to(tl.float32)
        tl.store(place, (before + acc).to(y.dtype.element_ty), mask=is_own)


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """True if the kernels can add to outputs of this dtype on this device."""
    return dtype in DTYPES and (device.type == "cuda" or INTERPRETED)


@dataclass(frozen=True)
class GroupedPair:
    """One adapter as the kernels read it. A: (r, d_in); B: (r, d_out), the scale in it. Contiguous."""

    A: Tensor
    B: Tensor

    @staticmethod
    def of(A: Tensor, B: Tensor, dtype: torch.dtype, device: torch.device) -> "GroupedPair":
        """From A (r, d_in) and the scaled B (d_out, r)."""
        kept = GroupedPair(A.detach().to(device, dtype).contiguous(), B.detach().mT.to(device, dtype).contiguous())
        if kept.A.data_ptr() % 16 or kept.B.data_ptr() % 16:  # kernels are told that addresses are round
            return GroupedPair(kept.A.clone(), kept.B.clone())
        return kept

    @property
    def pair(self) -> Pair:
        """The same factors for the torch forms, as views."""
        return Pair(self.A, self.B.mT)

    @property
    def row(self) -> tuple[int, int, int]:
        """What the table holds of it."""
        return self.A.data_ptr(), self.B.data_ptr(), self.A.shape[0]


class Table:
    """Addresses and ranks of the adapters at one site by slot, on the device: (slots, 3) int64, rank 0 where empty.

    Whoever captured a launch must capture it anew when `layout` has changed; what else happens to adapters it sees.
    """

    def __init__(self, device: torch.device) -> None:
        self.rows = torch.zeros(64, 3, dtype=torch.int64, device=device)
        self.rank_room = BLOCK_RANK  # ranks that a row of hidden values has room for; never less again

    def fill(self, slot: int, pair: GroupedPair | None) -> None:
        """Enter an adapter, or take it out. The pair must be kept alive by whoever calls."""
        if slot >= len(self.rows):
            grown = self.rows.new_zeros(2 * (slot + 1), 3)
            grown[: len(self.rows)] = self.rows
            self.rows = grown
        row = pair.row if pair else (0, 0, 0)
        self.rows[slot] = torch.tensor(row, dtype=torch.int64)
        self.rank_room = max(self.rank_room, -(-row[2] // BLOCK_RANK) * BLOCK_RANK)

    @property
    def layout(self) -> tuple[int, int]:
        """Changes when launches are shaped differently or read other memory."""
        return self.rows.data_ptr(), self.rank_room


def add(out: Tensor, x: Tensor, table: Table, batch: MixedBatch, layer: int) -> None:
    """out[t] += sum over the mix of token t of weight * B (A x[t]), in place.

    x: (tokens, d_in), out: (tokens, d_out), one dtype, unit stride in the last dimension.
    """
    if not batch.mixes:
        return
    grouping = Grouping.of(batch)
    tiles, pairs, weights = len(grouping.tiles), grouping.max_pairs, grouping.weights
    d_in, d_out, splits = x.shape[1], out.shape[1], splits_of(x.shape[1])
    span = triton.cdiv(triton.cdiv(d_in, splits), BLOCK_IN) * BLOCK_IN
    hidden = torch.empty(tiles * pairs * splits * TILE, table.rank_room, dtype=torch.float32, device=x.device)
    _shrink[(tiles, pairs, splits * table.rank_room // BLOCK_RANK)](
        x, hidden, grouping.tiles, grouping.pair_slot, weights, layer * weights.stride(0), table.rows, len(table.rows),
        pairs, table.rank_room, d_in, x.stride(0),
        SPLITS=splits, SPAN=span, TILE=TILE, BLOCK_RANK=BLOCK_RANK, BLOCK_IN=BLOCK_IN, WIDE=INTERPRETED,
    )  # fmt: skip
    _expand[(tiles, triton.cdiv(d_out, BLOCK_OUT))](
        out, hidden, grouping.tiles, grouping.pair_slot, table.rows, len(table.rows), pairs, table.rank_room, d_out,
        out.stride(0), SPLITS=splits, TILE=TILE, BLOCK_RANK=BLOCK_RANK, BLOCK_OUT=BLOCK_OUT, WIDE=INTERPRETED,
    )  # fmt: skip


def splits_of(d_in: int) -> int:
    """Programs that share the sum over d_in inputs: a single token must not wait for one program to read all of A."""
    wanted: int = triton.next_power_of_2(triton.cdiv(d_in, 8 * BLOCK_IN))
    return min(MAX_SPLITS, wanted)
