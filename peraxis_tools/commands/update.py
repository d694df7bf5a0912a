"""`peraxis-tools update`."""

from __future__ import annotations

import click

import peraxis_format as pxd
from peraxis_tools.chain import update
from peraxis_tools.commands.options import json_option, overwrite_option, prefer_option, quiet_option
from peraxis_tools.commands.sources import updates_of
from peraxis_tools.display.progress import staged
from peraxis_tools.report.console import emit
from peraxis_tools.report.update import render_update

__all__ = ["command"]


@click.command("update")
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@click.option("--output", "-o", required=True, metavar="PXD|URL", help="The .pxd to write.")
@click.option(
    "--after",
    multiple=True,
    metavar="PXD|FOLDER|URL|ID",
    help="Existing updates on OLD; the new one follows them. Repeatable.",
)
@prefer_option
@overwrite_option
@json_option
@quiet_option
def command(
    old: str,
    new: str,
    output: str,
    after: tuple[str, ...],
    prefer: pxd.Prefer,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the changes from OLD to NEW, bit for bit. Both are folders, safetensors files or hub ids.

    The file records the states before and after it, so that updates form a chain.

    \b
    Example: peraxis-tools update step-123 step-124 -o step-000124.pxd
             peraxis-tools update base step-124 --after updates -o updates/step-000124.pxd
             peraxis-tools update base step-124 --after s3://bucket/run -o s3://bucket/run/step-000124.pxd
    """
    step = staged(quiet=quiet)
    with updates_of(after, quiet=quiet, output=output) as files:
        result = update(old, new, output, after=files, prefer=prefer, overwrite=overwrite, progress=step)
    emit(result, render_update, schema="peraxis.update/1", as_json=as_json, written=output)
