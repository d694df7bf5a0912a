"""`peraxis-tools apply`."""

from __future__ import annotations

from pathlib import Path

import click

import peraxis_format as pxd
from peraxis_tools.apply import apply, checkpoint_bytes
from peraxis_tools.commands.options import json_option, overwrite_option, quiet_option, workers_option
from peraxis_tools.commands.sources import fetched
from peraxis_tools.report import emit, progress
from peraxis_tools.report.apply import render_apply

__all__ = ["command"]


@click.command("apply")
@click.argument("base", metavar="BASE")
@click.argument("deltas", metavar="DELTA...", nargs=-1, required=True)
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--shard-size", default=5.0, show_default=True, type=click.FloatRange(min=0.001), help="GB a shard.")
@overwrite_option
@workers_option
@json_option
@quiet_option
def command(
    base: str,
    deltas: tuple[str, ...],
    output: Path,
    shard_size: float,
    overwrite: bool,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write BASE + DELTA as a complete Hugging Face folder. BASE is a folder or a hub id, DELTA a path or a URL.

    Several are the updates of a chain; their order comes from the files.

    \b
    Example: peraxis-tools apply meta-llama/Llama-3.1-8B delta.pxd -o my-model
             peraxis-tools apply base updates/step-*.pxd -o step-124
    """
    with fetched(deltas, quiet=quiet) as paths:
        with pxd.open(paths[-1]) as file:
            total = checkpoint_bytes(file.manifest)
        with progress("apply", total, quiet=quiet) as step:
            result = apply(
                base,
                paths,
                output,
                overwrite=overwrite,
                shard_bytes=int(shard_size * 1e9),
                workers=workers,
                progress=step,
            )
    emit(result, render_apply, schema="peraxis.apply/1", as_json=as_json)
