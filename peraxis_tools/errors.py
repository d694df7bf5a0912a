"""Errors of the tools; exit codes live on the classes (README, "Exit codes")."""

from __future__ import annotations

import os
from typing import ClassVar, Final

from peraxis_format.errors import first_line

__all__ = [
    "CheckFailedError",
    "NotVerifiableError",
    "OptionError",
    "ToolError",
    "error_line",
    "first_line",
    "library_reason",
]


_HEAD: Final = 3000  # characters of a message that are shown: a name in a file may have millions
_TAIL: Final = 500


def error_line(error: BaseException) -> str:
    """The message of an error on one line, without the middle of a long one; the system's begin with the path."""
    line = _line(error)
    return line if len(line) <= _HEAD + _TAIL else f"{line[:_HEAD]} [...] {line[-_TAIL:]}"


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        if str(error.filename) == "-":
            return f"-: {error.strerror}; standard input is not read, because a file is read in parts: name a file"
        other = "" if error.filename2 is None else f" (from {os.fsdecode(error.filename2)})"
        return f"{os.fsdecode(str(error.filename))}: {error.strerror}{other}"
    if isinstance(error, FileNotFoundError) and error.filename is None and not _has_current_folder():
        return "the current folder was removed; change to another one"
    return " ".join(str(error).split()) or type(error).__name__


def _has_current_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def library_reason(error: BaseException, *, folder: str = "", shown: str = "") -> str:
    """Why transformers could not load or use a file, on one line; with the error's type, unless the text is enough.

    folder: the path that the library knows. shown: the name to write in its place.
    """
    if "trust_remote_code" in str(error):
        return "it needs code of its own (auto_map), which is never run"
    line = first_line(error).replace(folder, shown) if folder else first_line(error)
    return line if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {line}"


class ToolError(Exception):
    """An error of usage, input or I/O; the message says in one line what is wrong, where, and what to do.

    reason: the message without the remedy, if the remedy was given apart from it.
    """

    exit_status: ClassVar[int] = 2

    def __init__(self, reason: str, *, remedy: str | None = None) -> None:
        self.reason = reason
        super().__init__(reason if remedy is None else f"{reason}; {remedy}")


class CheckFailedError(ToolError):
    """A check that the user requested failed."""

    exit_status = 1


class NotVerifiableError(ToolError):
    """A check could not be made here, because something that it needs is missing."""

    exit_status = 3


class OptionError(ToolError):
    """An option or its value is unknown; the message names it and the allowed values."""
