"""Critical sections that no signal interrupts: a change of state that has begun is finished first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any, Final, TypeAlias

__all__ = ["uninterrupted"]

_Handler: TypeAlias = Callable[[int, FrameType | None], Any]
_NAMES: Final = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGBREAK")
_SIGNALS: Final = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer Ctrl-C, and other signals that Python code handles, to the end of the block.

    Ctrl-C waits for the whole block, which should hold nothing but the change of state. Python runs handlers in the
    main thread alone, so in other threads this does nothing. A handler that raises, like that of Ctrl-C, raises at the
    end of the block, also in place of the block's own error. A signal that comes several times is handled once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deferred: dict[int, Callable[[], Any]] = {}
    before: dict[int, _Handler] = {}
    try:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler  # noted first, because the old handler may raise here
                signal.signal(number, partial(_defer, deferred, handler))
        yield
    finally:
        try:
            _set(before)
        finally:
            _run(deferred)


def _defer(deferred: dict[int, Callable[[], Any]], handler: _Handler, number: int, frame: FrameType | None) -> None:
    deferred[number] = partial(handler, number, frame)


def _set(handlers: dict[int, _Handler]) -> None:
    """Set the handlers again. One that is set already may raise; the others are set nevertheless."""
    try:
        while handlers:
            number, handler = next(iter(handlers.items()))
            signal.signal(number, handler)
            handlers.pop(number, None)
    finally:
        if handlers:
            _set(handlers)


def _run(deferred: dict[int, Callable[[], Any]]) -> None:
    """Run the deferred handlers, all of them even if one raises."""
    try:
        while deferred:
            deferred.pop(next(iter(deferred)))()
    finally:
        if deferred:
            _run(deferred)
