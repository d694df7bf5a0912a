"""Work on several threads, results in order, a bounded number of bytes in flight."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["ordered_map"]

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(
    work: Callable[[T], R],
    items: Iterable[T],
    *,
    cost: Callable[[T], int],
    budget: int,
    workers: int | None = None,
) -> Iterator[R]:
    """Yield work(item) in the order of items, on several threads.

    cost: bytes that an item holds while it is worked on or waits to be handed over; no item begins while that would
    bring the sum above budget, except that one item may always be in flight. The first error ends it.
    """
    waiting: deque[tuple[int, Future[R]]] = deque()
    ahead = 0
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        try:
            for item in items:
                size = cost(item)
                while waiting and ahead + size > budget:
                    its_size, future = waiting.popleft()
                    yield future.result()
                    ahead -= its_size
                waiting.append((size, pool.submit(work, item)))
                ahead += size
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, future in waiting:
                future.cancel()
