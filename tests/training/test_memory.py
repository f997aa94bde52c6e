"""What training asks of malloc: memory that was freed stays with the process."""

import subprocess
import sys

import pytest

_PROBE = """
import resource, torch
from training.memory import keep_freed

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(8_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults(20)
assert keep_freed()
faults(1)
print(usual, faults(20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_not_cleared_again() -> None:
    """32 MB, taken and freed 20 times: page faults every time, then none to speak of."""
    told = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True).stdout

    usual, kept = map(int, told.split())
    assert kept * 10 < usual
