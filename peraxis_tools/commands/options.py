"""Options that several verbs share, so that they are spelled and explained once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from peraxis_tools.errors import ToolError

__all__ = ["json_option", "masks_option", "overwrite_option", "quiet_option", "workers_option"]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON with a schema version.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress, no notes.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what stands under the output's name.")
workers_option = click.option(
    "--workers", type=click.IntRange(min=1), default=None, help="Threads (default: one a processor)."
)


def masks_option(kind: click.ParamType[Any], *, help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`--masks`, passed as `masks`; `--bits`, its name before, still works and is not shown."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*args: Any, masks: Any = None, bits: Any = None, **given: Any) -> None:
            if masks is not None and bits is not None:
                raise ToolError("--bits is another name of --masks: give one of them")
            command(*args, masks=bits if masks is None else masks, **given)

        return click.option("--masks", type=kind, help=help)(click.option("--bits", type=kind, hidden=True)(run))

    return decorate
