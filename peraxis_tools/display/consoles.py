"""The consoles of rich for both standard streams.

If the reader of a stream goes away (`| head`), a plain Console ends the process with exit code 1, which here means a
failed check, and whichever stream it was, standard output is discarded.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Final

from rich.console import Console

__all__ = ["LEAST_WIDTH", "console_of_bar", "shows_progress", "standard_error", "standard_output"]

LEAST_WIDTH: Final = 80  # columns that tables are laid out for


_with_bar: list[Console] = []  # that of the bar which is shown first, or empty


class _Output(Console):
    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that is being handled; the command line ends with code 0 (cli.py)."""
        raise  # noqa: PLE0704  within the `except` of rich


class _Errors(Console):
    def on_broken_pipe(self) -> None:
        """Print nothing more; the work goes on."""
        self.quiet = True


def standard_output() -> Console:
    """A console for results on standard output. Where it is narrow, lines wrap, and no column of a table is cropped."""
    console = _Output(highlight=False, soft_wrap=True, emoji=False)
    console.width = max(console.width, LEAST_WIDTH)
    return console


def standard_error() -> Console:
    """A console for errors and notes on standard error; that of a bar which is shown, so that they go above the bar."""
    return _with_bar[0] if _with_bar else _errors()


@contextlib.contextmanager
def console_of_bar() -> Iterator[Console]:
    """A console for a bar on standard error. Until the end `standard_error` returns it, if no other bar is shown."""
    console = _errors()
    first = not _with_bar
    if first:
        _with_bar.append(console)
    try:
        yield console
    finally:
        if first:
            _with_bar.remove(console)


def _errors() -> Console:
    return _Errors(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def shows_progress() -> bool:
    """Whether bars and messages of progress are shown: standard error is a terminal.

    FORCE_COLOR, which many CI systems set, asks for colour alone; it does not make a file a terminal.
    """
    return sys.stderr is not None and sys.stderr.isatty() and standard_error().is_terminal
