"""Errors of the tools; exit codes live on the classes (README, "Exit codes")."""

from __future__ import annotations

import os
from typing import ClassVar

from peraxis_format.errors import first_line

__all__ = ["CheckFailedError", "NotVerifiableError", "OptionError", "ToolError", "error_line", "first_line"]


def error_line(error: BaseException) -> str:
    """The message of an error on one line; errors of the system begin with the path."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        other = "" if error.filename2 is None else f" (from {os.fsdecode(error.filename2)})"
        return f"{os.fsdecode(str(error.filename))}: {error.strerror}{other}"
    return " ".join(str(error).split()) or type(error).__name__


class ToolError(Exception):
    """An error of usage, input or I/O; the message says in one line what is wrong, where, and what to do."""

    exit_status: ClassVar[int] = 2


class CheckFailedError(ToolError):
    """A check that the user requested failed."""

    exit_status = 1


class NotVerifiableError(ToolError):
    """A check could not be made here, because something that it needs is missing."""

    exit_status = 3


class OptionError(ToolError):
    """An option or its value is unknown; the message names it and the allowed values."""
