"""The process of a command line: standard streams that are closed or not UTF-8, and signals.

This module imports the standard library and `interrupts` alone, so that it can run before slow imports.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final, TypeAlias

from peraxis_tools.process.interrupts import deaf, end_at_once, raise_interrupt, received

__all__ = ["Terminated", "drop_output", "drop_signals", "interrupt_behind", "prepared_process", "told_on_interrupt"]

# Signals that ask a process to end. Each is raised as Terminated, so that open contexts clean up.
_ENDING: Final = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_CLEANUP_SECONDS: Final = 10.0  # after which a process that a signal was to end has not noticed it
_AGAIN_SECONDS: Final = 0.05  # after which a signal whose exception was lost is sent again
_terminated_at: list[float] = []  # the time of the last such signal
_Handler: TypeAlias = Callable[[int, FrameType | None], None]


class Terminated(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.exit_status = 128 + number


def interrupt_behind(error: BaseException) -> BaseException | None:
    """The interrupt that led to an error, with the notes of the error; None if no signal came.

    Python and libraries turn an interrupt into errors of their own, above all while modules are imported.
    """
    if not received:
        return None
    number = received[0]
    interrupt = KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
    for sentence in getattr(error, "__notes__", ()):
        interrupt.add_note(sentence)
    return interrupt


@contextlib.contextmanager
def told_on_interrupt(said: Callable[[], str | None], *, alone: bool = False) -> Iterator[None]:
    """If the block is interrupted, add a note that the command line prints.

    said: gives one sentence about what is left, or None. alone: it takes the place of the notes of the steps inside,
    which are not true for the whole; those of other errors too.
    """
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, (KeyboardInterrupt, Terminated)) or received
        if not interrupted and not (alone and hasattr(error, "__notes__")):
            raise
        if alone:
            error.__notes__ = []
        if (sentence := said()) is not None:
            error.add_note(sentence)
        raise


class _ClosedStream(io.TextIOBase):
    """Replaces a standard output that the caller closed; the first write is an error, not a crash."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "is closed, so nothing can be printed", "standard output")


@contextlib.contextmanager
def prepared_process() -> Iterator[None]:
    """Within the block, streams accept any text, and signals that end the process are exceptions."""
    # A new file must not get the descriptor of a closed stream, because libraries write to that number.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = _ClosedStream()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    before = {}
    if threading.current_thread() is threading.main_thread():
        # An ignored signal (nohup) stays ignored.
        before = {number: signal.getsignal(number) for number in _ENDING if signal.getsignal(number) == signal.SIG_DFL}
        if (handler := signal.getsignal(signal.SIGINT)) in (signal.default_int_handler, end_at_once):
            before[signal.SIGINT] = handler
    received.clear()
    for number in before:
        signal.signal(number, raise_interrupt if number == signal.SIGINT else _terminate)
    hook, sys.unraisablehook = sys.unraisablehook, _repeat_lost
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        received.clear()  # errors of later work in this process are its own


def _terminate(number: int, frame: FrameType | None) -> None:
    if deaf:
        return
    _replace_handlers(_drop_for_a_while, instead_of=(raise_interrupt, _terminate))  # do not interrupt the cleanup
    received.append(number)
    _terminated_at[:] = [time.monotonic()]
    raise Terminated(number)


def _drop_for_a_while(number: int, frame: FrameType | None) -> None:
    # A library may catch every exception, and the process goes on. Then a later signal counts.
    if not deaf and time.monotonic() - _terminated_at[0] >= _CLEANUP_SECONDS:
        _terminated_at[:] = [time.monotonic()]
        raise Terminated(number)


def _repeat_lost(lost: sys.UnraisableHookArgs) -> None:
    """Send a signal again whose exception Python discards: one that came within a callback of ctypes, as numba has
    while it compiles, or within `__del__`. Other exceptions that are lost are reported as usual.
    """
    if not received or lost.exc_type not in (KeyboardInterrupt, Terminated):
        sys.__unraisablehook__(lost)
        return
    deaf.append(True)
    try:
        if lost.exc_type is Terminated:
            _terminated_at[:] = [-math.inf]  # the next one counts
        again = threading.Timer(_AGAIN_SECONDS, _send, [received[-1]])
        again.daemon = True
        again.start()
    finally:
        deaf.clear()


def _send(number: int) -> None:
    """Send a signal to the main thread as soon as it can raise one, unless it has ended its work."""
    while deaf:
        time.sleep(_AGAIN_SECONDS)
    if sys.unraisablehook is _repeat_lost:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def drop_signals() -> None:
    """Do nothing at further signals, because this process ends. Only handlers of `prepared_process` are replaced."""
    _replace_handlers(_drop, instead_of=(raise_interrupt, _terminate, _drop_for_a_while))


def _replace_handlers(handler: _Handler, *, instead_of: tuple[_Handler, ...]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (*_ENDING, signal.SIGINT):
            if signal.getsignal(number) in instead_of:
                signal.signal(number, handler)


def _drop(number: int, frame: FrameType | None) -> None:
    """A handler, and not SIG_IGN: for a signal that came just before SIG_IGN was set Python prints an error."""


def drop_output() -> None:
    """Discard the buffer of a failed standard output, also at the end of the process."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
