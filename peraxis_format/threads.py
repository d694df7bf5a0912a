"""Jobs that release the GIL, on threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from threading import Thread

__all__ = ["run_jobs", "thread_count"]


def thread_count() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(jobs: Iterable[Callable[[], None]], *, threads: int | None = None) -> None:
    """Run jobs on `threads` threads, this one among them (default: one a processor). Raises the first error.

    After an error no further job is begun; when this returns or raises, none is running any more.
    """
    waiting = deque(jobs)
    errors: list[BaseException] = []

    def work() -> None:
        while not errors:
            try:
                job = waiting.popleft()
            except IndexError:
                return
            try:
                job()
            except BaseException as error:
                errors.append(error)

    helpers = [Thread(target=work) for _ in range(min(threads or thread_count(), len(waiting)) - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
