"""Threads for jobs that release the GIL: kernels, hashes, reads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Thread
from typing import TypeVar

from peraxis_format.arguments import check_least

__all__ = ["ThreadPool", "run_jobs", "thread_count"]

T = TypeVar("T")


def thread_count() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(jobs: Iterable[Callable[[], None]], *, threads: int | None = None) -> None:
    """Run jobs on `threads` threads, this one included (default: one per processor). Raises the first error.

    After an error no further job starts; when this returns or raises, no job is running.
    """
    check_least("workers", threads, 1)
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


class ThreadPool:
    """Threads that live as long as this object. count: by default one for each processor this process may use."""

    def __init__(self, count: int | None = None) -> None:
        check_least("workers", count, 1)
        self.count = count or thread_count()
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="peraxis")

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Start one job."""
        return self._pool.submit(job)

    def run(self, jobs: Iterable[Callable[[], object]]) -> None:
        """Run jobs to their end. Raises the first error in their order, after all jobs have ended."""
        futures = [self._pool.submit(job) for job in jobs]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def __enter__(self) -> ThreadPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
