"""Jobs that release the GIL, on threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

__all__ = ["run_jobs", "thread_count"]


def thread_count() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(jobs: Iterator[Callable[[], None]], *, threads: int | None = None) -> None:
    """Run jobs on `threads` threads (default: all processors). Raises what a job raises first.

    When this returns or raises, no job is running any more.
    """
    listed = list(jobs)
    count = min(threads or thread_count(), len(listed))
    if count <= 1:
        for job in listed:
            job()
    else:
        with ThreadPoolExecutor(count) as pool:
            _wait([pool.submit(job) for job in listed])


def _wait(futures: Sequence[Future[None]]) -> None:
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
