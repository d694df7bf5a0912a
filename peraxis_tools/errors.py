"""Errors of the tools; exit codes live on the classes (README, "Exit codes")."""

from __future__ import annotations

from typing import ClassVar

__all__ = ["CheckFailedError", "NotVerifiableError", "OptionError", "ToolError"]


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
