"""`peraxis-tools apply`."""

from __future__ import annotations

from pathlib import Path

import click

from peraxis_tools.apply import apply
from peraxis_tools.checkpoints.checkpoint import refuse_swapped
from peraxis_tools.commands.options import (
    SIZE,
    base_revision_option,
    json_option,
    overwrite_option,
    quiet_option,
    workers_option,
)
from peraxis_tools.commands.sources import updates_of
from peraxis_tools.display.progress import staged
from peraxis_tools.report.apply import render_apply
from peraxis_tools.report.console import emit

__all__ = ["command"]


@click.command("apply")
@click.argument("base", metavar="BASE")
@click.argument("deltas", metavar="DELTA...", nargs=-1, required=True)
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--shard-size", default="5GB", show_default=True, type=SIZE, help="The size of a shard, 1MB or more, like 2GB."
)
@base_revision_option
@overwrite_option
@workers_option("4")
@json_option
@quiet_option
def command(
    base: str,
    deltas: tuple[str, ...],
    base_revision: str | None,
    output: Path,
    shard_size: int,
    overwrite: bool,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write BASE + DELTA as a complete Hugging Face folder. BASE is a folder or a hub id; DELTA is a path or a URL.

    Several are the updates of a chain; their order comes from the files. DELTA may also be a folder of updates: a path,
    a URL or a repository on the hub.

    \b
    Example: peraxis-tools apply meta-llama/Llama-3.1-8B delta.pxd -o my-model
             peraxis-tools apply base updates/step-*.pxd -o step-124
             peraxis-tools apply base s3://bucket/run -o step-124
    """
    refuse_swapped(base, deltas[0])
    with updates_of(deltas, quiet=quiet) as paths:
        result = apply(
            base,
            paths,
            output,
            overwrite=overwrite,
            base_revision=base_revision,
            shard_size=shard_size,
            workers=workers,
            progress=staged(quiet=quiet),
        )
    emit(result, render_apply, schema="peraxis.apply/1", as_json=as_json, written=output)
