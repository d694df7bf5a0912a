"""Ctrl-C during imports, which lose nothing and cannot be interrupted cleanly.

The command line imports this module first, so it imports no module that Python has not loaded at its start.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # compiled into Python; the rest of `signal` needs many modules
import os

__all__ = ["INTERRUPTED", "deaf", "end_at_once", "finished", "interrupts_end", "raise_interrupt", "received"]

INTERRUPTED = 130
# The signals that asked this process to end, so that an error that one of them led to is told from others.
received: list[int] = []
# Not empty while an exception would be lost; the signal is sent again afterwards.
deaf: list[bool] = []
# The exit status of a process whose work is done; empty before.
finished: list[int] = []


def raise_interrupt(number: int, frame: object) -> None:
    """The handler of SIGINT while a verb runs."""
    received.append(number)
    if not deaf:
        raise KeyboardInterrupt


class interrupts_end:  # noqa: N801  a context manager, used like contextlib.suppress
    """Let Ctrl-C end the process at once within the block, if it would raise KeyboardInterrupt otherwise."""

    def __enter__(self) -> None:
        self._before = _signal.getsignal(_signal.SIGINT)
        self._changed = self._before in (_signal.default_int_handler, raise_interrupt)
        try:
            if self._changed:
                _signal.signal(_signal.SIGINT, end_at_once)
        except ValueError:  # signals belong to the main thread
            self._changed = False

    def __exit__(self, *_: object) -> None:
        if self._changed:
            _signal.signal(_signal.SIGINT, self._before)


def end_at_once(number: int, frame: object) -> None:
    """The handler of SIGINT while nothing can be lost."""
    if finished:
        os._exit(finished[0])
    try:  # noqa: SIM105  contextlib is not loaded yet
        os.write(2, b"error: interrupted\n")
    except OSError:
        pass
    os._exit(INTERRUPTED)
