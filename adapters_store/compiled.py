"""Builds a C file once per machine, with the compiler at hand, into the user's cache folder.

The library is kept under a digest of source, flags and processor, so that the next process finds it and a change builds
anew. Who builds is ready to do without: there may be no compiler, or no folder to write in. ESPALIER_NATIVE=0 switches
building off, ESPALIER_CACHE names another folder.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared")
FAILURES = (OSError, RuntimeError, subprocess.SubprocessError)  # RuntimeError: no home folder to cache in


@dataclass(frozen=True)
class Status:
    """Whether a native kernel serves, and what the operator should know about it."""

    active: bool
    detail: str


def build(name: str, sources: Sequence[Path], flags: Sequence[str] = FLAGS, *, included: Sequence[Path] = ()) -> Path:
    """Path of the shared library of these sources, compiled if it is not in the cache; with OpenMP where there is.

    name: what the file in the cache begins with. included: files that the sources include. Raises one of FAILURES;
    `reason` tells what to say of it.
    """
    if os.environ.get("ESPALIER_NATIVE", "1") == "0":
        raise OSError("switched off by ESPALIER_NATIVE=0")
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise OSError("no C compiler found (cc, gcc or clang)")
    target = _cache_folder() / f"{name}-{_digest(compiler, [*sources, *included], flags)}.so"
    if not target.exists():
        _build(compiler, sources, flags, target)
    return target


def reason(error: BaseException) -> str:
    """Why there is no library, in a line or a few: what the compiler said, if it spoke."""
    return str(getattr(error, "stderr", None) or error).strip()[:300]


def _build(compiler: str, sources: Sequence[Path], flags: Sequence[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        try:
            _compile(compiler, sources, [*flags, "-fopenmp"], built)
        except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread
            _compile(compiler, sources, flags, built)
        built.replace(target)  # atomic: two processes may build at once


def _compile(compiler: str, sources: Sequence[Path], flags: Sequence[str], target: Path) -> None:
    command = [compiler, *flags, "-o", str(target), *map(str, sources), "-lm"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def _cache_folder() -> Path:
    own, usual = os.environ.get("ESPALIER_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(own) if own else Path(usual).expanduser() / "espalier"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(compiler: str, files: Sequence[Path], flags: Sequence[str]) -> str:
    """Of all that decides the machine code; the processor too, because -march=native is per processor."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = platform.processor() + platform.machine()
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor = "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    parts = (*(file.read_text() for file in files), compiler, " ".join(flags), processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
