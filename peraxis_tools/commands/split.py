"""`peraxis-tools split`."""

from __future__ import annotations

from pathlib import Path

import click

from peraxis_tools.commands.options import json_option, overwrite_option, quiet_option
from peraxis_tools.commands.sources import fetched
from peraxis_tools.display.progress import staged
from peraxis_tools.report.console import emit
from peraxis_tools.report.merge import render_split
from peraxis_tools.split import split

__all__ = ["command"]


@click.command("split")
@click.argument("delta", metavar="DELTA")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The folder for the parts.")
@click.option("--parts", required=True, type=click.IntRange(min=2), help="The number of parts.")
@overwrite_option
@json_option
@quiet_option
def command(delta: str, output: Path, parts: int, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Split DELTA into parts that `merge` joins again, byte for byte. A part alone cannot be applied.

    \b
    Example: peraxis-tools split delta.pxd --parts 4 -o parts
    """
    with fetched([delta], quiet=quiet) as paths:
        result = split(paths[0], output, parts=parts, overwrite=overwrite, progress=staged(quiet=quiet))
    emit(result, render_split, schema="peraxis.split/1", as_json=as_json, written=output)
