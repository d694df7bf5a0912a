"""The start of the `peraxis-tools` process: Ctrl-C ends it in one line before, between and after all that it does.

A program that imports `peraxis_tools.cli` keeps its own handler. This module imports no module that Python has not
loaded at its start, so that only Python's own start is not covered.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # compiled into Python; the rest of `signal` needs many modules

from peraxis_tools.process.interrupts import end_at_once, finished, interrupts_end

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its code."""
    interrupts_end().__enter__()  # until the process ends
    import atexit  # not loaded at the start of Python; an interrupt from here on is handled

    atexit.register(_ignore_at_the_end)  # the first one that is registered runs last
    from peraxis_tools.cli import main as run

    try:
        run()
    except SystemExit as done:
        finished.append(done.code if isinstance(done.code, int) else 0)
        raise


def _ignore_at_the_end() -> None:
    """Ignore SIGINT while Python takes itself down: it would reset the signal, and a process that is done would die."""
    if _signal.getsignal(_signal.SIGINT) is end_at_once:
        _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
