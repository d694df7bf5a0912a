"""How many threads there are to use."""

from __future__ import annotations

import os

__all__ = ["thread_count"]


def thread_count() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
