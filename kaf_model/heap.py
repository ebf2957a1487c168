"""How the process's C library treats memory that is freed."""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the process keep what it frees, instead of giving it back and asking for fresh pages a moment later.

    A training step on the CPU frees and allocates the same hundreds of megabytes again and again; with glibc,
    which gives large blocks back at once, a tenth of a step and more goes into zeroing fresh pages. It holds
    for the whole process, so it is for one that only computes, not for one that somebody works in.

    Returns:
        Whether there is such a C library here; elsewhere nothing is done.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        return all(mallopt(option, _NEVER) for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
    return False
