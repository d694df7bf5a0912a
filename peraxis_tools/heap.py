"""The heap of the C library: settings of a process that compresses, and the return of freed memory."""

from __future__ import annotations

import ctypes
import os
from typing import Final

__all__ = ["trim_heap", "tune_heap"]

# M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
_HEAP: Final = ((-8, 1), (-3, 32 << 20), (-1, 256 << 20))


def tune_heap() -> None:
    """Let all threads share one heap, and return tensors above 32 MB at once, if the C library can (glibc).

    By default glibc gives each thread a heap, where what one thread frees is of no use to another. A smaller size for
    what is returned at once lowers the peak by some more, but then a third of the time goes into fresh pages. The
    settings stay until the process ends, so a command calls this and a function does not.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if tune is not None:
        for parameter, value in _HEAP:
            tune(parameter, value)


def trim_heap() -> None:
    """Return freed memory to the system, if the C library supports it (glibc).

    glibc caches freed memory in a heap for each thread; without this call, peak memory grows with the number of blocks.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
