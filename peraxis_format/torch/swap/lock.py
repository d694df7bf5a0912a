"""A readers-writer lock: many forwards or one swap. The shared side is re-entrant per thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from peraxis_format.errors import LiveModelError

__all__ = ["SwapLock"]


class SwapLock:
    """A waiting swap has priority over new forwards, so that steady traffic cannot starve it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._depth: dict[int, int] = {}
        self._waiting = 0
        self._exclusive = False

    def enter(self) -> None:
        """Begin a forward; this blocks while a swap runs or waits."""
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
        """Hold the shared side, for a forward or for several that must see the same weights."""
        before = self._depth.get(threading.get_ident(), 0)
        try:
            # Inside the `try`, because an interrupt may come between the entry and the next line.
            self.enter()
            yield
        finally:
            if self._depth.get(threading.get_ident(), 0) > before:
                self.leave()

    def refuse_inside(self) -> None:
        """Raise LiveModelError inside a forward of this thread, because waiting for its end would never return."""
        with self._condition:
            if threading.get_ident() in self._depth:
                raise LiveModelError("a swap inside a forward of the same thread; swap between steps")

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the exclusive side, for a swap. Raises LiveModelError as refuse_inside."""
        self.refuse_inside()
        with self._condition:
            self._waiting += 1
            try:
                while self._exclusive or self._depth:
                    self._condition.wait()
                self._exclusive = True
            finally:
                self._waiting -= 1
                self._condition.notify_all()  # an interrupted swap must not block others
        try:
            yield
        finally:
            with self._condition:
                self._exclusive = False
                self._condition.notify_all()
