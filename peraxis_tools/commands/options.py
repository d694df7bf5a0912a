"""Options that several verbs share, so that they are spelled and explained once."""

from __future__ import annotations

import logging

import click

from peraxis_tools.notes import LOGGER

__all__ = ["json_option", "overwrite_option", "quiet_option", "workers_option"]


def _hushed(_: click.Context, __: click.Parameter, quiet: bool) -> bool:
    LOGGER.setLevel(logging.ERROR if quiet else logging.NOTSET)
    return quiet


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON with a schema version.")
quiet_option = click.option("--quiet", "-q", is_flag=True, callback=_hushed, help="No progress, no notes.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what stands under the output's name.")
workers_option = click.option(
    "--workers", type=click.IntRange(min=1), default=None, help="Threads (default: one a processor)."
)
