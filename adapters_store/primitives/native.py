"""Builds, checks and calls lowrank.c and lowrank_bf16.c.

The kernel is compiled once per machine with the C compiler at hand (half a second), kept in the user's cache folder
under a digest of source, flags and processor, and checked against torch before it is used. Without a compiler, or on a
GPU, or where the check fails, the torch forms serve; `status()` says which and why. ESPALIER_NATIVE=0 switches it off.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters_store.mixing import TILE, MixedBatch
from adapters_store.primitives.two_layer import Pair

MAX_RANK = 512  # as in lowrank.c
_SOURCES = [Path(__file__).with_name(name) for name in ("lowrank.c", "lowrank_bf16.c")]
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared")


@dataclass(frozen=True)
class Status:
    """Whether the native kernel serves, and what the operator should know about it."""

    active: bool
    detail: str


@dataclass(frozen=True)
class NativePair:
    """One adapter in the kernel's layout, the scale folded into b.

    float32: a (d_in, lanes), b (rank, d_out). Where the processor multiplies bfloat16, for a bfloat16 backbone, in
    neighbouring pairs: a (d_in / 2, lanes, 2), b (rank / 2, d_out, 2), odd sizes filled with zeros.
    """

    a: Tensor
    b: Tensor
    rank: int

    @staticmethod
    def of(A: Tensor, B: Tensor, *, paired: bool) -> "NativePair":
        """From A (r, d_in) and the scaled B (d_out, r); paired: see `is_paired`."""
        rank, d_in = A.shape
        lanes = 8 if rank <= 8 else -(-rank // 16) * 16
        a = torch.zeros(d_in, lanes)
        a[:, :rank] = A.mT
        b = B.float().mT.contiguous()
        return NativePair(_paired(a), _paired(b), rank) if paired else NativePair(a, b, rank)

    def unpaired(self) -> Pair | None:
        """The same factors for the torch forms, as views; None where they lie in pairs."""
        return Pair(self.a[:, : self.rank].mT, self.b.mT) if self.a.ndim == 2 else None

    @property
    def row(self) -> tuple[int, int, int, int]:
        """The C struct `entry`."""
        return self.a.data_ptr(), self.b.data_ptr(), self.rank, self.a.shape[1]


def _paired(rows: Tensor) -> Tensor:
    """(n, width) as bfloat16 (n / 2, width, 2): each two neighbouring rows side by side, element by element."""
    even = torch.zeros(rows.shape[0] + rows.shape[0] % 2, rows.shape[1], dtype=torch.bfloat16)
    even[: rows.shape[0]] = rows
    return even.view(-1, 2, rows.shape[1]).transpose(1, 2).contiguous()


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
    """The C array of entries by slot at one site, and the ranks in it. Empty slots have rank 0 and are skipped."""

    def __init__(self) -> None:
        self.ranks = np.zeros(0, np.int64)
        self._rows = np.zeros((0, 4), np.int64)
        self.address = 0

    def fill(self, slot: int, rank: int, pair: NativePair | None) -> None:
        """Enter an adapter; without a pair its rank only, for the cost model."""
        self.reach(slot)
        self.ranks[slot] = rank
        self._rows[slot] = pair.row if pair else 0

    def reach(self, slot: int) -> None:
        """Grow until the slot has a row: the kernel reads the row of every slot of a batch, also of absent ones."""
        if slot < len(self.ranks):
            return
        room = max(16, 2 * (slot + 1))
        self.ranks = np.concatenate([self.ranks, np.zeros(room - len(self.ranks), np.int64)])
        self._rows = np.concatenate([self._rows, np.zeros((room - len(self._rows), 4), np.int64)])
        self.address = self._rows.ctypes.data


class _Pointers:
    """Addresses of a batch's tables; asking numpy for one costs more than the rest of a call, so once per batch."""

    def __init__(self, batch: MixedBatch) -> None:
        weights = batch.pair_weight.detach().numpy()  # (num_layers, pairs)
        self._kept = (batch.tiles, batch.mix_offset, batch.pair_slot, weights)
        self.tables = (
            self._kept[0].ctypes.data,
            len(self._kept[0]),
            self._kept[1].ctypes.data,
            self._kept[2].ctypes.data,
        )
        self.weights = [weights.ctypes.data + layer * weights.strides[0] for layer in range(len(weights))]
        self.threads = torch.get_num_threads()


def add(out: Tensor, x: Tensor, table: Table, batch: MixedBatch, layer: int) -> None:
    """out[t] += sum over the mix of token t of weight * B (A x[t]), in place.

    x: (tokens, d_in), out: (tokens, d_out), unit stride in the last dimension. The table must reach batch.max_slot.
    """
    pointers: _Pointers | None = batch.memo.get("native")
    if pointers is None:
        pointers = batch.memo["native"] = _Pointers(batch)
    library = _load()[0]
    function = getattr(library, _entry_points(library)[x.dtype])
    function(
        x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), x.shape[1], out.shape[1],
        *pointers.tables, pointers.weights[layer], table.address, pointers.threads,
    )  # fmt: skip


@functools.cache
def _load() -> tuple[Any, Status]:
    """The library and its status; built at the first call."""
    if os.environ.get("ESPALIER_NATIVE", "1") == "0":
        return None, Status(False, "switched off by ESPALIER_NATIVE=0; torch forms serve")
    try:
        library = _open(_build())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder to cache in
        reason = getattr(error, "stderr", None) or error
        return None, Status(False, f"not built, torch forms serve: {str(reason).strip()[:300]}")
    if not _agrees_with_torch(library):
        return None, Status(False, "built, but its results differ from torch's; torch forms serve")
    return library, Status(True, f"native kernel for {platform.machine()}, checked against torch")


def _build() -> Path:
    """Path of the shared library, compiled if it is not in the cache."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise OSError("no C compiler found (cc, gcc or clang)")
    target = _cache_folder() / f"lowrank-{_digest(compiler)}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / "lowrank.so"
        try:
            _compile(compiler, ["-fopenmp"], built)
        except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread
            _compile(compiler, [], built)
        built.replace(target)  # atomic: two processes may build at once
    return target


def _compile(compiler: str, extra: list[str], target: Path) -> None:
    command = [compiler, *_FLAGS, *extra, "-o", str(target), *map(str, _SOURCES)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def _cache_folder() -> Path:
    own, usual = os.environ.get("ESPALIER_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(own) if own else Path(usual).expanduser() / "espalier"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(compiler: str) -> str:
    """Of all that decides the machine code; the processor too, because -march=native is per processor."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = platform.processor() + platform.machine()
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor = "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    parts = (*(source.read_text() for source in _SOURCES), compiler, " ".join(_FLAGS), processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _entry_points(library: Any) -> dict[torch.dtype, str]:
    """The kernel of each dtype; bfloat16 in pairs where the processor has dot products for them."""
    pairs = "_pairs" if library.lowrank_pairs_bf16() else ""
    return {torch.float32: "lowrank_add_f32", torch.bfloat16: "lowrank_add_bf16" + pairs}


def _open(path: Path) -> Any:
    library = ctypes.CDLL(str(path))  # releases the GIL while it runs; shares torch's OpenMP threads (same soname)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.lowrank_pairs_bf16.restype = number
    for name in _entry_points(library).values():
        function = getattr(library, name)
        function.restype = None
        function.argtypes = [pointer, number, pointer, number, number, number,
                             pointer, number, pointer, pointer, pointer, pointer, number]  # fmt: skip
    return library


def _agrees_with_torch(library: Any) -> bool:
    """A small mixed case in odd sizes, each dtype, against plain torch."""
    generator = torch.Generator().manual_seed(0)
    tokens, d_in, d_out = 37, 83, 101
    tiles = np.array([(at, min(TILE, tokens - at), at // TILE % 2) for at in range(0, tokens, TILE)], np.int64)
    factors = [(torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)) for r in (3, 24)]
    offset, slots = np.array([0, 1, 3], np.int64), np.array([0, 0, 1], np.int64)
    weights = np.array([0.5, -1.5, 0.25], np.float32)
    for dtype, name in _entry_points(library).items():
        pairs = [NativePair.of(A, B, paired=name.endswith("_pairs")) for A, B in factors]
        bank = np.array([pair.row for pair in pairs], np.int64)
        x = torch.randn(tokens, d_in, generator=generator).to(dtype)
        out = torch.randn(tokens, d_out, generator=generator).to(dtype)
        expected = out.float()
        for start, length, mix in tiles.tolist():
            rows = slice(start, start + length)
            for pair in range(offset[mix], offset[mix + 1]):
                A, B = factors[slots[pair]]
                expected[rows] += float(weights[pair]) * (x[rows].float() @ A.mT @ B.mT)
        getattr(library, name)(
            x.data_ptr(), d_in, out.data_ptr(), d_out, d_in, d_out, tiles.ctypes.data, len(tiles),
            offset.ctypes.data, slots.ctypes.data, weights.ctypes.data, bank.ctypes.data, 1,
        )  # fmt: skip
        if not torch.allclose(
            out.float(),
            expected,
            rtol=2e-2 if dtype == torch.bfloat16 else 1e-4,
            atol=0.5 if dtype == torch.bfloat16 else 1e-3,
        ):
            return False
    return True
