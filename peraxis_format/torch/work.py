"""A pool of threads for jobs that release the GIL: kernels, hashes, reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import TypeVar

from peraxis_format.threads import thread_count

__all__ = ["Workers"]

T = TypeVar("T")


class Workers:
    """Threads that live as long as their owner. count: default one for each processor this process may use."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count or thread_count()
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="peraxis")

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Start one job."""
        return self._pool.submit(job)

    def run(self, jobs: Iterable[Callable[[], object]]) -> None:
        """Run jobs to their end. Raises the first error in their order, when none of them is running any more."""
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

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
