"""Builds, checks and calls lowrank.c and lowrank_bf16.c.

The kernel is compiled once per machine (compiled.py, two seconds) and checked against torch before it serves. Where
there is no compiler, on a GPU, or where the check fails, the torch forms serve; `status()` says which and why.
"""

import ctypes
import functools
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters_store import compiled, linear, memory, tape
from adapters_store.compiled import Status
from adapters_store.mixing import Mix, MixedBatch
from adapters_store.primitives.panels import Panels
from adapters_store.primitives.two_layer import Pair

PREPARED = "native"  # key of a batch's memo: the batch as the kernel takes it
BLOCK = 128  # columns of b that lie together; as in lowrank.c
MAX_RANK = 512  # beyond, a product is wide enough for torch's own
_FLAGS = (*compiled.FLAGS, "-ffp-contract=off")  # lowrank.c says why
_FILES = ("lowrank.c", "lowrank_bf16.c", "../prefetch.h", "../scratch.h")
_SOURCE, *_INCLUDED = (Path(__file__).parent / name for name in _FILES)


@dataclass(frozen=True)
class NativePair:
    """One adapter in the kernel's layout, the scale folded into b.

    float32: a (d_in, lanes), b in blocks of BLOCK columns, each (rank, columns), one behind the other. Where the
    processor multiplies bfloat16, for a bfloat16 backbone, in neighbouring pairs: a (d_in / 2, lanes, 2), b's blocks
    (rank / 2, columns, 2), odd sizes filled with zeros.
    """

    a: Tensor
    b: Tensor
    rank: int
    d_in: int
    d_out: int

    @staticmethod
    def of(A: Tensor, B: Tensor, *, paired: bool) -> "NativePair":
        """From A (r, d_in) and the scaled B (d_out, r); paired: see `is_paired`."""
        rank, d_in = A.shape
        lanes = 8 if rank <= 8 else -(-rank // 16) * 16
        a = torch.zeros(d_in, lanes)
        a[:, :rank] = A.mT
        b = B.float().mT
        rows = (_paired(a), _paired(b)) if paired else (a, b)
        both = rows[0], _in_blocks(rows[1])
        a, b = (memory.zeros(*part.shape, dtype=part.dtype).copy_(part) for part in both)
        return NativePair(a, b, rank, d_in, B.shape[0])

    @torch.inference_mode(mode=False)  # what serves first may not record gradients, and what comes next may
    def for_torch(self) -> Pair:
        """The same factors for the torch forms; copies, where they are not views."""
        is_paired = self.a.ndim == 3
        b = _from_blocks(self.b, self.d_out, 2 if is_paired else 1)
        a, b = (_unpaired(self.a), _unpaired(b)) if is_paired else (self.a, b.squeeze(-1))
        return Pair(a[: self.d_in, : self.rank].mT, b[: self.rank].mT)

    @property
    def row(self) -> tuple[int, int, int, int]:
        """The C struct `entry`."""
        return self.a.data_ptr(), self.b.data_ptr(), self.rank, self.a.shape[1]


def _paired(rows: Tensor) -> Tensor:
    """(n, width) as bfloat16 (n / 2, width, 2): each two neighbouring rows side by side, element by element."""
    even = torch.zeros(rows.shape[0] + rows.shape[0] % 2, rows.shape[1], dtype=torch.bfloat16)
    even[: rows.shape[0]] = rows
    return even.view(-1, 2, rows.shape[1]).transpose(1, 2).contiguous()


def _unpaired(pairs: Tensor) -> Tensor:
    """(n, width, 2) as (2 n, width)."""
    return pairs.transpose(1, 2).flatten(0, 1)


def _in_blocks(rows: Tensor) -> Tensor:
    """(n, width, …) flat: BLOCK columns of all rows, row after row, then the next."""
    return torch.cat([block.flatten() for block in torch.split(rows, BLOCK, dim=1)])


def _from_blocks(flat: Tensor, width: int, numbers: int) -> Tensor:
    """(n, width, numbers) again."""
    rows = len(flat) // (width * numbers)
    blocks = torch.split(flat, rows * BLOCK * numbers)
    return torch.cat([block.view(rows, -1, numbers) for block in blocks], dim=1)


def is_paired(dtype: torch.dtype) -> bool:
    """True if the kernel wants factors in bfloat16 pairs for a backbone of this dtype."""
    return dtype == torch.bfloat16 and is_active() and _entry_points(_load()[0])[dtype].endswith("_pairs")


def status() -> Status:
    """Which operator path serves low-rank deltas on the CPU."""
    return _load()[1]


def is_active() -> bool:
    """True if the kernel is built, checked and switched on."""
    return _load()[1].active


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """True if the kernel can add to outputs of this dtype on this device."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and is_active()


class Table:
    """The C struct `bank` of one site: entries by slot, and the ranks in them. Empty slots have rank 0."""

    layout = ()  # calls of the kernel depend on nothing that changes: the struct stays where it is

    def __init__(self) -> None:
        self.ranks = np.zeros(0, np.int64)
        self._rows = np.zeros((0, 4), np.int64)
        self._bank = np.zeros(2, np.int64)  # the C struct `bank`
        self.address = self._bank.ctypes.data

    def fill(self, slot: int, rank: int, pair: NativePair | None) -> None:
        """Enter an adapter; without a pair its rank only, for the cost model."""
        self.reach(slot)
        self.ranks[slot] = rank
        self._rows[slot] = pair.row if pair else 0

    def reach(self, slot: int) -> None:
        """Grow until the slot has a rank: the cost model asks for every slot of a batch, also for absent ones."""
        if slot < len(self.ranks):
            return
        room = max(16, 2 * (slot + 1))
        self.ranks = np.concatenate([self.ranks, np.zeros(room - len(self.ranks), np.int64)])
        self._rows = np.concatenate([self._rows, np.zeros((room - len(self._rows), 4), np.int64)])
        self._bank[:] = self._rows.ctypes.data, room


class _Plan(ctypes.Structure):
    """The C struct `plan`."""

    _fields_ = [
        ("num_panels", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("panels", "tokens", "groups", "uses", "weights")),
        ("num_pairs", ctypes.c_int64),
    ]


class _Site(ctypes.Structure):
    """The C struct `site`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("batch", "adapters", "x", "y")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride", "d_in", "d_out", "layer")),
    ]


class _Listing(ctypes.Structure):
    """The C struct `listing`."""

    _fields_ = [("here", ctypes.c_void_p), ("list", ctypes.c_void_p), ("number_bytes", ctypes.c_int64)]


class _Prepared:
    """A batch as the kernel takes it. Asking numpy for an address costs more than the rest of a call, so once here."""

    def __init__(self, batch: MixedBatch) -> None:
        weights = batch.pair_weight.detach().numpy()  # (num_layers, pairs)
        threads = torch.get_num_threads()
        panels = Panels.of(batch, threads)
        self._kept = (weights, panels)
        tables = (panels.panels, panels.tokens, panels.groups, panels.uses, weights)
        addresses = (table.ctypes.data for table in tables)
        self.plan = _Plan(len(panels.panels) - 1, threads, *addresses, weights.shape[1])
        self.address = ctypes.addressof(self.plan)

    @staticmethod
    def of(batch: MixedBatch) -> "_Prepared | Standing":
        """What was prepared for the batch, once."""
        prepared: _Prepared | Standing | None = batch.memo.get(PREPARED)
        if prepared is None:
            prepared = batch.memo[PREPARED] = _Prepared(batch)
        return prepared


class Standing:
    """A batch as the kernel takes it, whose content changes while its address stays: for calls on a tape.

    It takes part in a forward as memo[PREPARED] of a batch.
    """

    def __init__(self) -> None:
        self._plan = _Plan()
        self._prepared: _Prepared | Standing | None = None
        self.address = ctypes.addressof(self._plan)
        self._read_next = np.zeros(2 + 2 * linear.RUNS, np.int64)  # the C struct `prefetch_list`, one for all sites
        self.read_next = self._read_next.ctypes.data

    def load(self, batch: MixedBatch) -> None:
        """Make this batch the content; without mixes, nothing for the kernel to do."""
        if not batch.mixes:
            self._plan.num_panels, self._prepared = 0, None
            return
        prepared = _Prepared.of(batch)
        if prepared is not self._prepared:
            ctypes.memmove(self.address, prepared.address, ctypes.sizeof(_Plan))
            self._prepared = prepared


def add(out: Tensor, x: Tensor, table: Table, batch: MixedBatch, layer: int) -> None:
    """out[t] += sum over the mix of token t of weight * B (A x[t]), in place.

    x: (tokens, d_in), out: (tokens, d_out), unit stride in the last dimension.
    """
    _call(_functions()[x.dtype], out, x, table, batch, layer)


def _call(function: Any, out: Tensor, x: Tensor, table: Table, batch: MixedBatch, layer: int) -> None:
    prepared = _Prepared.of(batch)
    site = _Site(
        prepared.address, table.address, x.data_ptr(), out.data_ptr(), x.stride(0), out.stride(0),
        x.shape[1], out.shape[1], layer,
    )  # fmt: skip
    if isinstance(prepared, Standing):
        listing = _Listing(ctypes.addressof(site), prepared.read_next, 2 if is_paired(x.dtype) else 4)
        linear.prefetch_meanwhile(out, (_load()[0].lowrank_list, listing), prepared.read_next)
    if tape.call(function, site):
        raise MemoryError("no memory for the hidden states of a batch")


@functools.cache
def _functions() -> dict[torch.dtype, Any]:
    """The kernel of each dtype."""
    library = _load()[0]
    return {dtype: getattr(library, name) for dtype, name in _entry_points(library).items()}


@functools.cache
@tape.apart
def _load() -> tuple[Any, Status]:
    """The library and its status; built at the first call."""
    try:
        library = _open(compiled.build("lowrank", [_SOURCE], _FLAGS, included=_INCLUDED))
    except compiled.FAILURES as error:
        return None, Status(False, f"not built, torch forms serve: {compiled.reason(error)}")
    if not _agrees_with_torch(library):
        return None, Status(False, "built, but its results differ from torch's; torch forms serve")
    return library, Status(True, f"native kernel for {platform.machine()}, checked against torch")


@functools.cache
def _entry_points(library: Any) -> dict[torch.dtype, str]:
    """The kernel of each dtype; bfloat16 in pairs where the processor has dot products for them."""
    pairs = "_pairs" if hasattr(library, "lowrank_add_bf16_pairs") else ""
    return {torch.float32: "lowrank_add_f32", torch.bfloat16: "lowrank_add_bf16" + pairs}


def _open(path: Path) -> Any:
    library = ctypes.CDLL(str(path))  # releases the GIL while it runs; shares torch's OpenMP threads (same soname)
    for name in {"lowrank_add_bf16", *_entry_points(library).values()}:  # tests call also what does not serve here
        getattr(library, name).restype = ctypes.c_int64
    library.lowrank_list.restype = ctypes.c_int64
    return library


def _agrees_with_torch(library: Any) -> bool:
    """A small mixed case in odd sizes, each dtype, against plain torch."""
    generator, d_in, d_out = torch.Generator().manual_seed(0), 83, 101
    weights = torch.tensor([[0.5, 0.0], [-1.5, 0.25], [0.0, 1.0]])  # (mixes, slots)
    mixes = [Mix((0, 1), row[:, None].numpy()) for row in weights]
    rows = [(18, 0), (1, 1), (1, 0), (1, 2), (2, 1), (14, 2)]
    batch = MixedBatch.of([(length, mixes[mix]) for length, mix in rows], 1)
    weight = torch.cat([weights[mix].expand(length, 2) for length, mix in rows])  # (tokens, slots)
    factors = [(torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)) for r in (3, 24)]
    for dtype, name in _entry_points(library).items():
        table = Table()
        pairs = [NativePair.of(A, B, paired=name.endswith("_pairs")) for A, B in factors]
        for slot, pair in enumerate(pairs):
            table.fill(slot, pair.rank, pair)
        x = torch.randn(batch.num_tokens, d_in, generator=generator).to(dtype)
        out = torch.randn(batch.num_tokens, d_out, generator=generator).to(dtype)
        deltas = torch.stack([x.float() @ A.mT @ B.mT for A, B in factors], dim=1)  # (tokens, slots, d_out)
        expected = out.float() + (weight[..., None] * deltas).sum(dim=1)
        _call(getattr(library, name), out, x, table, batch, 0)
        rtol, atol = (2e-2, 0.5) if dtype == torch.bfloat16 else (1e-4, 1e-3)
        if not torch.allclose(out.float(), expected, rtol=rtol, atol=atol):
            return False
    return True
