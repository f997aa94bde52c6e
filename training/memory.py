"""What training asks of the C library's memory allocator.

A step frees and takes again the same large buffers. glibc gives such memory back to the system at once, and the system
clears every page anew: 5 to 10 % of a step on the CPU. Kept, it is there for the next step; peaks do not change.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_MUCH, _STEP = 2**31 - 1, 2**28  # bytes


def keep_freed() -> bool:
    """Keep freed memory for this process's next allocations; False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    asked = ((_MMAP_THRESHOLD, _MUCH), (_TRIM_THRESHOLD, _MUCH), (_TOP_PAD, _STEP))
    return all(mallopt(option, value) == 1 for option, value in asked)
