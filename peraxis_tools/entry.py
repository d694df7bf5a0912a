"""The start of the `peraxis-tools` process: Ctrl-C ends it in one line before, between and after all that it does.

A program that imports `peraxis_tools.cli` keeps its own handler. This module imports no module that Python has not
loaded at its start, so that only Python's own start is not covered.
"""

from __future__ import annotations

from peraxis_tools.interrupts import finished, interrupts_end

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its code."""
    interrupts_end().__enter__()  # until the process ends
    from peraxis_tools.cli import main as run

    try:
        run()
    except SystemExit as done:
        finished.append(done.code if isinstance(done.code, int) else 0)
        raise
