"""Options that several verbs share, so that they are spelled and explained once."""

from __future__ import annotations

import click

__all__ = ["json_option", "overwrite_option", "prefer_option", "quiet_option", "workers_option"]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON with a schema version.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress, no notes.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what stands under the output's name.")
prefer_option = click.option(
    "--prefer",
    type=click.Choice(["size", "speed"]),
    default="size",
    show_default=True,
    help="Of exact tensors: the fewest bytes, or what is applied soonest.",
)
workers_option = click.option(
    "--workers", type=click.IntRange(min=1), default=None, help="Threads (default: one a processor)."
)
