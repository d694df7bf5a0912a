"""`peraxis-tools log`."""

from __future__ import annotations

import click

from peraxis_tools.chain.log import log
from peraxis_tools.commands.options import json_option, quiet_option
from peraxis_tools.report.console import emit
from peraxis_tools.report.update import render_log

__all__ = ["command"]


@click.command("log")
@click.argument("source", metavar="FOLDER|URL|ID")
@json_option
@quiet_option
def command(source: str, as_json: bool, quiet: bool) -> None:
    """List the updates of a folder in the order of their chain, with the number of changes, the bytes and the result.

    From a URL only headers are fetched.

    \b
    Example: peraxis-tools log updates
             peraxis-tools log s3://bucket/run
    """
    emit(log(source), render_log, schema="peraxis.log/1", as_json=as_json)
