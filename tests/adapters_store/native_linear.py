"""What linear.c and likeliest.c need of a machine, found out without them."""

import shutil
from pathlib import Path

import pytest
import torch

_CPUINFO = Path("/proc/cpuinfo")
_FLAGS = set(_CPUINFO.read_text().split()) if _CPUINFO.exists() else set()
_HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
_NEEDED = ((torch.float32, {"avx512bw", "avx512vl"}), (torch.bfloat16, {"avx512bw", "avx512_bf16"}))
DTYPES = tuple(dtype for dtype, flags in _NEEDED if _HAS_COMPILER and flags <= _FLAGS)
needs_kernel = pytest.mark.skipif(not DTYPES, reason="needs a C compiler and AVX-512")
needs_screen = pytest.mark.skipif(not (DTYPES and "avx512_vnni" in _FLAGS), reason="needs a C compiler and AVX512-VNNI")
