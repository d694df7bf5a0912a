"""Memory of a process that compresses: settings of the C library and of torch, and freed memory."""

from __future__ import annotations

import ctypes
import os
from typing import Final

__all__ = ["trim_heap", "tune_process"]

# M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
_HEAP: Final = ((-8, 1), (-3, 8 << 20), (-1, 256 << 20))
_HUGE_PAGES: Final = "THP_MEM_ALLOC_ENABLE"  # torch takes large tensors from them


def tune_process() -> None:
    """Let all threads share one heap, and return tensors above 8 MB at once, if the C library can (glibc).

    By default glibc gives each thread its own heap, so memory that one thread frees is not reused by another, and it
    keeps freed tensors in gaps that larger ones do not fit. Returned memory costs page faults later, fewer with huge
    pages. The settings last until the process ends, so only a command calls this, before it imports torch.
    """
    os.environ.setdefault(_HUGE_PAGES, "1")
    tune = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if tune is not None:
        for parameter, size in _HEAP:
            tune(parameter, size)


def trim_heap() -> None:
    """Return freed memory to the system, if the C library supports it (glibc).

    glibc caches freed memory in a heap for each thread; without this call, peak memory grows with the number of blocks.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
