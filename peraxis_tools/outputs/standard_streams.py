"""Standard output as the output of a verb (`-o /dev/stdout`): the report then goes to standard error.

What was claimed is a fact of one command, so it is kept in click's context. Without one nobody prints a report.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Final, TextIO

import click

from peraxis_tools.errors import ToolError

__all__ = ["claim_stream", "refuse_notes", "report_stream", "same_stream"]

_KEY: Final = "peraxis.output"
_STDOUT, _STDERR = 1, 2


def claim_stream(path: Path) -> None:
    """Mark standard output as taken, if `path` is another name of it."""
    context = click.get_current_context(silent=True)
    if context is not None and _is_open_as(path, _STDOUT):
        context.meta[_KEY] = True


def refuse_notes(path: Path) -> None:
    """Raise ToolError if `path` is another name of standard error: notes would be written into the file."""
    if _is_open_as(path, _STDERR):
        raise ToolError(f"{path}: is standard error too, where notes go; redirect one of them, or name a file")


def report_stream() -> TextIO:
    """Where the report of this command goes: standard output, or standard error if an output takes that."""
    context = click.get_current_context(silent=True)
    return sys.stderr if context is not None and context.meta.get(_KEY) else sys.stdout


def same_stream(path: Path, other: Path) -> bool:
    """Whether both are names of one pipe or open file. A device such as /dev/null may be named twice."""
    try:
        one, two = os.stat(path), os.stat(other)
    except OSError:
        return False
    return os.path.samestat(one, two) and not stat.S_ISCHR(one.st_mode)


def _is_open_as(path: Path, descriptor: int) -> bool:
    try:
        named, opened = os.stat(path), os.fstat(descriptor)
        null = os.stat(os.devnull)
    except OSError:  # closed, or gone
        return False
    return os.path.samestat(named, opened) and not os.path.samestat(opened, null)
