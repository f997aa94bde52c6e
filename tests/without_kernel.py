"""What a kernel's module says in a process of its own that cannot have the kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
without_kernel = pytest.mark.parametrize(
    ("changes", "reason"), [({"ESPALIER_NATIVE": "0"}, "ESPALIER_NATIVE=0"), ({"PATH": ""}, "no C compiler")]
)


def said(script: str, cache: Path, changes: dict[str, str]) -> Any:
    """What the script's last line says in JSON, with these changes to the environment and nothing built before."""
    environment = os.environ | {"ESPALIER_CACHE": str(cache), "PYTHONPATH": str(ROOT)} | changes
    environment.pop("CC", None)
    answer = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])
