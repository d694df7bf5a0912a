"""Many forwards or one swap: a shared and an exclusive side, re-entrant per thread on the shared one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from peraxis_format.errors import LiveModelError

__all__ = ["SwapLock"]


class SwapLock:
    """A waiting swap goes before forwards that have not begun, so that steady traffic cannot starve it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._depth: dict[int, int] = {}
        self._waiting = 0
        self._exclusive = False

    def enter(self) -> None:
        """Begin a forward; blocks while a swap runs or waits."""
        me = threading.get_ident()
        with self._condition:
            if me not in self._depth:
                while self._exclusive or self._waiting:
                    self._condition.wait()
            self._depth[me] = self._depth.get(me, 0) + 1

    def leave(self) -> None:
        """End a forward of this thread. A call without a forward is ignored."""
        me = threading.get_ident()
        with self._condition:
            depth = self._depth.pop(me, 0) - 1
            if depth > 0:
                self._depth[me] = depth
            self._condition.notify_all()

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the shared side: for a forward, or several that must see the same weights."""
        before = self._depth.get(threading.get_ident(), 0)
        try:
            # Inside the `try`: an interrupt may come between the entry and the next line.
            self.enter()
            yield
        finally:
            if self._depth.get(threading.get_ident(), 0) > before:
                self.leave()

    def refuse_inside(self) -> None:
        """Raise LiveModelError inside a forward of this thread: waiting for its end would never return."""
        with self._condition:
            if threading.get_ident() in self._depth:
                raise LiveModelError("a swap inside a forward of the same thread; swap between steps")

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the exclusive side: for a swap. Raises as refuse_inside does."""
        self.refuse_inside()
        with self._condition:
            self._waiting += 1
            try:
                while self._exclusive or self._depth:
                    self._condition.wait()
                self._exclusive = True
            finally:
                self._waiting -= 1
                self._condition.notify_all()  # an interrupted swap holds nobody back
        try:
            yield
        finally:
            with self._condition:
                self._exclusive = False
                self._condition.notify_all()
