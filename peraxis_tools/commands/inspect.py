"""`peraxis-tools inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from peraxis_format.arguments import did_you_mean
from peraxis_format.hub import hub_path
from peraxis_format.urls import is_url
from peraxis_tools.commands.options import json_option, overwrite_option, quiet_option, refuse_given
from peraxis_tools.commands.sources import fetched
from peraxis_tools.deltas.inspection import InspectResult, select
from peraxis_tools.display.bars import progress
from peraxis_tools.display.progress import staged
from peraxis_tools.errors import ToolError
from peraxis_tools.inspect import inspect, inspect_remote
from peraxis_tools.outputs.rules import claim_files
from peraxis_tools.report.console import emit, print_note
from peraxis_tools.report.inspect import render_inspect

__all__ = ["command"]


@click.command("inspect")
@click.argument("delta", metavar="DELTA")
@click.option("--modules/--no-modules", default=False, help="Also print a line for each module.")
@click.option("--module", "pattern", metavar="GLOB", help="Print a line for each module whose name matches.")
@click.option("--tree", is_flag=True, help="Print the modules as a tree with sums of bytes.")
@click.option("--plot", "figure", type=click.Path(path_type=Path), help="Write plots to this .png or .svg file.")
@click.option("--html", "page", type=click.Path(path_type=Path), help="Write a report for a browser to this file.")
@overwrite_option
@json_option
@quiet_option
def command(
    delta: str,
    modules: bool,
    pattern: str | None,
    tree: bool,
    figure: Path | None,
    page: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show the fine-tune and the base of DELTA, and the use of its bytes. DELTA is a path or a URL.

    Only the header is read, also from a URL. --plot and --html read the scales too, and so fetch a remote file.

    \b
    Example: peraxis-tools inspect delta.pxd --modules
             peraxis-tools inspect hf://org/repo/delta.pxd --module '*.q_proj.*'
             peraxis-tools inspect delta.pxd --plot delta.png --html delta.html
    """
    outputs = [path for path in (figure, page) if path is not None]
    if overwrite and not outputs:
        refuse_given("overwrite", why="without --plot or --html")
    if as_json:
        refuse_given("tree", "modules", why="with --json, which holds all of it")
    with claim_files(outputs, overwrite=overwrite, inputs=(delta,)):
        result = inspect_remote(delta) if is_url(delta) else inspect(hub_path(delta))
        if outputs:
            _write(result, delta, figure, page, overwrite=overwrite, quiet=quiet)
    if pattern is not None:
        names = [line.name for line in result.modules]
        result = select(result, pattern)
        if not result.modules:
            raise ToolError(
                f"{delta}: has no module that matches {pattern!r}; a glob is for the whole name, like '*.q_proj.*'"
                f"{did_you_mean(pattern, names)}"
            )
    emit(
        result,
        lambda result, console: render_inspect(result, console, modules=modules or pattern is not None, tree=tree),
        schema="peraxis.inspect/1",
        as_json=as_json,
    )


def _write(
    result: InspectResult, delta: str, figure: Path | None, page: Path | None, *, overwrite: bool, quiet: bool
) -> None:
    from peraxis_tools.inspect_details import details
    from peraxis_tools.report.html import write_page
    from peraxis_tools.report.plot import plot

    with fetched([delta], quiet=quiet) as (path,):
        found = details(path, progress=staged(quiet=quiet))
    if figure is not None:
        with progress("plot", None, quiet=quiet):
            plot(result, found, figure, overwrite=overwrite)
        print_note(f"wrote {figure}", quiet=quiet)
    if page is not None:
        write_page(result, found, page, overwrite=overwrite)
        print_note(f"wrote {page}", quiet=quiet)
