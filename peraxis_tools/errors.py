"""Errors of the tools; exit codes live on the classes (README, "Exit codes")."""

from __future__ import annotations

import os
from typing import ClassVar

__all__ = ["CheckFailedError", "NotVerifiableError", "OptionError", "ToolError", "error_line"]


def error_line(error: BaseException) -> str:
    """What an error says, on one line; of the system's errors the path first."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        other = "" if error.filename2 is None else f" (from {os.fsdecode(error.filename2)})"
        return f"{os.fsdecode(str(error.filename))}: {error.strerror}{other}"
    return " ".join(str(error).split()) or type(error).__name__


class ToolError(Exception):
    """Usage, input or I/O: what is wrong, where, and what to do, in one line."""

    exit_status: ClassVar[int] = 2


class CheckFailedError(ToolError):
    """A check that the user asked for did not hold."""

    exit_status = 1


class NotVerifiableError(ToolError):
    """A check that could not be made here: something it needs is missing."""

    exit_status = 3


class OptionError(ToolError):
    """An option is unknown, or its value is; the message names it and what it may be."""
