"""What tests of Triton kernels share: where they run, and a compiler for a GPU that is not there.

The interpreter is chosen when triton is imported, for the whole process. So a test file of kernels starts itself once
more in a process that has chosen it.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, which this file starts")
starts_itself = pytest.mark.skipif(INTERPRETED, reason="this is the process that was started")
devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
SHARED_BYTES = 227 * 1024  # of a program on sm_90


def run_interpreted(file: str) -> None:
    """Run a test file with kernels interpreted; its failures are this test's message."""
    triton = pytest.importorskip("triton", reason="needs triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of triton before 3.7 converts arrays as numpy has deprecated, and 2.4 has removed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", file]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    found = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def compiled(kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, object], dtype: str) -> Any:
    """A kernel compiled for sm_90 without a GPU. pointers: types by argument, "*{}" for the backbone's dtype.

    Addresses and strides are taken for round ones, as a launch finds them; other arguments are 32-bit integers.
    """
    from triton import compiler
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    own = {name: value for name, value in constants.items() if name in names}
    types = {name: pointers.get(name, "i32").format(dtype) for name in names} | dict.fromkeys(own, "constexpr")
    is_round = [name.endswith(("stride", "d_in", "d_out", "room")) or types[name].startswith("*") for name in names]
    attrs = {(i,): [["tt.divisibility", 16]] for i in range(len(names)) if is_round[i]}
    source = compiler.ASTSource(
        fn=kernel, signature=types, constexprs={(names.index(k),): v for k, v in own.items()}, attrs=attrs
    )
    return compiler.compile(source, target=GPUTarget("cuda", 90, 32))
