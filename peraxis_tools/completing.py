"""Completion of file names in a shell, for arguments and options that click knows as plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from click.types import StringParamType

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["completing_files"]


class _NameType(StringParamType):
    """A text that may be a file name: a path, a hub id or a URL."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


_NAME = _NameType()


def completing_files(command: click.Command) -> click.Command:
    """The same command; a shell completes its plain texts as file names."""
    for parameter in command.params:
        if parameter.type is click.STRING:
            parameter.type = _NAME
    return command
