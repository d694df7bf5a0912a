"""`peraxis-tools compact`."""

from __future__ import annotations

import click

import peraxis_format as pxd
from peraxis_tools.chain import compact
from peraxis_tools.commands.options import json_option, overwrite_option, prefer_option, quiet_option
from peraxis_tools.commands.sources import updates_of
from peraxis_tools.display.progress import staged
from peraxis_tools.report.console import emit
from peraxis_tools.report.update import render_compact

__all__ = ["command"]


@click.command("compact")
@click.argument("updates", metavar="UPDATE...", nargs=-1, required=True)
@click.option("--base", required=True, metavar="FOLDER|ID", help="The checkpoint that the first update was made on.")
@click.option("--output", "-o", required=True, metavar="PXD|URL", help="The .pxd to write.")
@prefer_option
@overwrite_option
@json_option
@quiet_option
def command(
    updates: tuple[str, ...],
    base: str,
    output: str,
    prefer: pxd.Prefer,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fold a chain of updates into one with the same result, which is checked before it is written.

    The base is needed because changes are coded relative to its weights. UPDATE is a file, or a folder of updates: a
    path, a URL or a repository on the hub.

    \b
    Example: peraxis-tools compact step-0001*.pxd --base step-99 -o 100-to-124.pxd
    """
    with updates_of(updates, quiet=quiet, output=output) as paths:
        result = compact(base, paths, output, prefer=prefer, overwrite=overwrite, progress=staged(quiet=quiet))
    emit(result, render_compact, schema="peraxis.compact/1", as_json=as_json, written=output)
