"""Contexts that change a setting of the whole process, and may be entered by several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

__all__ = ["ProcessContext"]


class ProcessContext:
    """A context for all threads: the first one that enters opens it, and the last one that leaves closes it.

    If each thread restored what it found, the last one would restore the setting of another thread.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        """make: returns the context of one thread."""
        self._make = make
        self._lock = threading.Lock()
        self._inside = 0
        self._open = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Enter the context. Raises the errors of its opening and its closing."""
        with self._lock:
            if self._inside == 0:
                self._open.enter_context(self._make())
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._open.close()
