"""`peraxis-tools extract`."""

from __future__ import annotations

from pathlib import Path

import click

from peraxis_tools.commands.options import json_option, overwrite_option, quiet_option
from peraxis_tools.extract import extract
from peraxis_tools.report.console import emit
from peraxis_tools.report.extract import render_extract

__all__ = ["command"]


@click.command("extract")
@click.argument("delta", metavar="DELTA")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@overwrite_option
@json_option
@quiet_option
def command(delta: str, output: Path, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Write the small files of DELTA (configuration, tokenizer, chat templates) to a folder. No base is needed.

    DELTA may be a URL; then only its header and these files are fetched.

    \b
    Example: peraxis-tools extract delta.pxd -o tokenizer
    """
    result = extract(delta, output, overwrite=overwrite)
    emit(result, render_extract, schema="peraxis.extract/1", as_json=as_json, written=output)
