"""Work on several threads, with results in the order of the items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from peraxis_tools.process.threads import pool_size

__all__ = ["balanced_map", "ordered_map"]

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(
    work: Callable[[T], R],
    items: Iterable[T],
    *,
    cost: Callable[[T], int],
    budget: int,
    workers: int | None = None,
) -> Generator[R]:
    """Yield work(item) in the order of items, on several threads.

    cost: bytes that an item uses from its start until its result is taken. No item starts if the sum would exceed
    budget, except that one item may always be in flight. The first error ends it. A caller that keeps it in a variable
    closes it: else an error leaves its threads to the garbage collector, which may wait for them while another thread
    starts, and then both wait for ever.
    """
    waiting: deque[tuple[int, Future[R]]] = deque()
    ahead = 0
    with ThreadPoolExecutor(workers or pool_size()) as pool:
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


def balanced_map(
    work: Callable[[T], R], items: Sequence[T], *, cost: Callable[[T], int], workers: int | None = None
) -> list[R]:
    """[work(item) for item in items] on several threads, for work that holds little memory.

    cost: the time of an item, in any unit. The longest starts first, so that it is not the last to finish. The error of
    the first failed item is raised, and items that have not started are cancelled.
    """
    longest_first = sorted(range(len(items)), key=lambda place: -cost(items[place]))
    with ThreadPoolExecutor(workers or pool_size()) as pool:
        futures = {place: pool.submit(work, items[place]) for place in longest_first}
        try:
            return [futures[place].result() for place in range(len(items))]
        finally:
            for future in futures.values():
                future.cancel()
