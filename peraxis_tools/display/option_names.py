"""Options in errors and notes: functions say `overwrite (--overwrite)`, the command line says `--overwrite`."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

__all__ = ["on_the_command_line"]

_BOTH: Final = re.compile(r"(?:\bthe )?\b[a-z][a-z_-]*(?:=\w+)? \((?P<option>--[a-z][^()]*)\)")
_FIRST: Final = re.compile(r"[a-z][a-z_]*(?= )")


def on_the_command_line(message: str, options: Collection[str] = ()) -> str:
    """The message of an error or a note with the names that a user of the command line types.

    `name (--option)` and `name=False (--option)` become `--option`. A message that begins with an argument's name
    begins with the option, if the command has it. options: those of the command, like `--masks`; empty for a message
    that begins with something else.
    """
    shown = _BOTH.sub(r"\g<option>", message)
    first = _FIRST.match(shown)
    option = "" if first is None else f"--{first[0].replace('_', '-')}"
    return f"{option}{shown[len(option) - 2 :]}" if option in options else shown
