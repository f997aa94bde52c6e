"""Builds, checks and calls lowrank.c.

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
import numpy.typing as npt
import torch
from torch import Tensor

from adapters_store.mixing import TILE, MixedBatch

MAX_RANK = 512  # as in lowrank.c
_SOURCE = Path(__file__).with_name("lowrank.c")
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared")
_ENTRY_POINTS = {torch.float32: "lowrank_add_f32", torch.bfloat16: "lowrank_add_bf16"}


@dataclass(frozen=True)
class Status:
    """Whether the native kernel serves, and what the operator should know about it."""

    active: bool
    detail: str


@dataclass(frozen=True)
class NativePair:
    """One adapter in the kernel's layout, float32. a: (d_in, lanes), b: (rank, d_out) with the scale folded in."""

    a: Tensor
    b: Tensor

    @staticmethod
    def of(A: Tensor, B: Tensor) -> "NativePair":
        """From A (r, d_in) and the scaled B (d_out, r)."""
        rank, d_in = A.shape
        lanes = 8 if rank <= 8 else -(-rank // 16) * 16
        a = torch.zeros(d_in, lanes)
        a[:, :rank] = A.mT
        return NativePair(a, B.float().mT.contiguous())

    @property
    def row(self) -> tuple[int, int, int, int]:
        """The C struct `entry`."""
        return self.a.data_ptr(), self.b.data_ptr(), self.b.shape[0], self.a.shape[1]


def status() -> Status:
    """Which operator path serves low-rank deltas on the CPU."""
    return _load()[1]


def is_active() -> bool:
    """True if the kernel is built, checked and switched on."""
    return _load()[1].active


def supports(x: Tensor, rank: int) -> bool:
    """True if the kernel can add a delta of this rank to an output computed from x."""
    return rank <= MAX_RANK and x.device.type == "cpu" and x.dtype in _ENTRY_POINTS and is_active()


def add(out: Tensor, x: Tensor, bank: npt.NDArray[np.int64], batch: MixedBatch, layer: int) -> None:
    """Add to out, in place, what the mix of each token contributes.

    out: (tokens, d_out), x: (tokens, d_in), float32 or bfloat16, last dimension contiguous. bank: (slots, 4) int64 rows
    of NativePair.row, zeros for slots with nothing here.
    """
    weights = batch.pair_weight_rows[layer]
    function = getattr(_load()[0], _ENTRY_POINTS[x.dtype])
    function(
        x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), x.shape[1], out.shape[1],
        batch.tiles.ctypes.data, len(batch.tiles), batch.mix_offset.ctypes.data, batch.pair_slot.ctypes.data,
        weights.ctypes.data, bank.ctypes.data, torch.get_num_threads(),
    )  # fmt: skip


@functools.cache
def _load() -> tuple[Any, Status]:
    """The library and its status; built at the first call."""
    if os.environ.get("ESPALIER_NATIVE", "1") == "0":
        return None, Status(False, "switched off by ESPALIER_NATIVE=0; torch forms serve")
    try:
        library = _open(_build())
    except (OSError, subprocess.CalledProcessError) as error:
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
        os.replace(built, target)  # atomic: two processes may build at once
    return target


def _compile(compiler: str, extra: list[str], target: Path) -> None:
    command = [compiler, *_FLAGS, *extra, "-o", str(target), str(_SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def _cache_folder() -> Path:
    root = os.environ.get("ESPALIER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "espalier"
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(compiler: str) -> str:
    """Of all that decides the machine code; the processor too, because -march=native is per processor."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = platform.processor() + platform.machine()
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor = "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    parts = (_SOURCE.read_text(), compiler, " ".join(_FLAGS), processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _open(path: Path) -> Any:
    library = ctypes.CDLL(str(path))  # releases the GIL while it runs; shares torch's OpenMP threads (same soname)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name in _ENTRY_POINTS.values():
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
    pairs = [NativePair.of(A, B) for A, B in factors]
    bank = np.array([pair.row for pair in pairs], np.int64)
    offset, slots = np.array([0, 1, 3], np.int64), np.array([0, 0, 1], np.int64)
    weights = np.array([0.5, -1.5, 0.25], np.float32)
    for dtype, name in _ENTRY_POINTS.items():
        x = torch.randn(tokens, d_in, generator=generator).to(dtype)
        out = torch.randn(tokens, d_out, generator=generator).to(dtype)
        expected = out.float()
        for start, length, mix in tiles.tolist():
            for pair in range(offset[mix], offset[mix + 1]):
                A, B = factors[slots[pair]]
                expected[start : start + length] += float(weights[pair]) * (x[start : start + length].float() @ A.mT @ B.mT)
        getattr(library, name)(x.data_ptr(), d_in, out.data_ptr(), d_out, d_in, d_out, tiles.ctypes.data, len(tiles),
                               offset.ctypes.data, slots.ctypes.data, weights.ctypes.data, bank.ctypes.data, 1)  # fmt: skip
        if not torch.allclose(out.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3):
            return False
    return True
