"""`peraxis-tools apply`."""

from __future__ import annotations

from pathlib import Path

import click

from peraxis_tools.apply import apply
from peraxis_tools.commands.options import Finite, json_option, overwrite_option, quiet_option, workers_option
from peraxis_tools.commands.sources import updates_of
from peraxis_tools.progress import staged
from peraxis_tools.report import emit
from peraxis_tools.report.apply import render_apply

__all__ = ["command"]


@click.command("apply")
@click.argument("base", metavar="BASE")
@click.argument("deltas", metavar="DELTA...", nargs=-1, required=True)
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--shard-size", default=5.0, show_default=True, type=Finite(min=0.001, max=1e6), help="The size of a shard in GB."
)
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
    """Write BASE + DELTA as a complete Hugging Face folder. BASE is a folder or a hub id; DELTA is a path or a URL.

    Several are the updates of a chain; their order comes from the files. DELTA may also be a folder of updates: a path,
    a URL or a repository on the hub.

    \b
    Example: peraxis-tools apply meta-llama/Llama-3.1-8B delta.pxd -o my-model
             peraxis-tools apply base updates/step-*.pxd -o step-124
             peraxis-tools apply base s3://bucket/run -o step-124
    """
    with updates_of(deltas, quiet=quiet) as paths:
        result = apply(
            base,
            paths,
            output,
            overwrite=overwrite,
            shard_bytes=int(shard_size * 1e9),
            workers=workers,
            progress=staged(quiet=quiet),
        )
    emit(result, render_apply, schema="peraxis.apply/1", as_json=as_json)
