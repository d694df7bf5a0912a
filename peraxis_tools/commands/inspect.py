"""`peraxis-tools inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from peraxis_tools.commands.options import json_option
from peraxis_tools.inspect import inspect
from peraxis_tools.report import emit
from peraxis_tools.report.inspect import render_inspect

__all__ = ["command"]


@click.command("inspect")
@click.argument("delta", type=click.Path(path_type=Path))
@click.option("--modules/--no-modules", default=True, help="A line a module.")
@json_option
def command(delta: Path, modules: bool, as_json: bool) -> None:
    """Show what DELTA is, for which base, and where its bytes go. Reads the header only.

    Example: peraxis-tools inspect delta.pxd --no-modules
    """
    result = inspect(delta)
    emit(
        result,
        lambda result, console: render_inspect(result, console, modules=modules),
        schema="peraxis.inspect/1",
        as_json=as_json,
    )
