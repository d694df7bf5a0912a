"""`peraxis-tools verify`."""

from __future__ import annotations

from pathlib import Path

import click

from peraxis_tools.commands.options import json_option, quiet_option, workers_option
from peraxis_tools.report import emit, progress
from peraxis_tools.report.verify import render_verify
from peraxis_tools.verify import verify, verify_size

__all__ = ["command"]


@click.command("verify")
@click.argument("delta", type=click.Path(path_type=Path))
@click.option("--base", metavar="FOLDER|ID", help="Check the binding to this base too.")
@workers_option
@json_option
@quiet_option
def command(delta: Path, base: str | None, workers: int | None, as_json: bool, quiet: bool) -> None:
    """Check DELTA: structure, payload, and with --base that it was made for this base.

    Example: peraxis-tools verify delta.pxd --base meta-llama/Llama-3.1-8B
    """
    with progress("verify", verify_size(delta, base), quiet=quiet) as step:
        result = verify(delta, base=base, workers=workers, progress=step)
    emit(result, render_verify, schema="peraxis.verify/1", as_json=as_json)
