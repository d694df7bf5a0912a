"""`peraxis-tools log`."""

from __future__ import annotations

from pathlib import Path

import click

from peraxis_tools.chain.log import log
from peraxis_tools.commands.options import json_option, quiet_option
from peraxis_tools.report import emit
from peraxis_tools.report.update import render_log

__all__ = ["command"]


@click.command("log")
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path, exists=True, file_okay=False))
@json_option
@quiet_option
def command(folder: Path, as_json: bool, quiet: bool) -> None:
    """List the updates of FOLDER in the order of their chain, with the number of changes, the bytes and the result.

    Example: peraxis-tools log updates
    """
    emit(log(folder), render_log, schema="peraxis.log/1", as_json=as_json)
