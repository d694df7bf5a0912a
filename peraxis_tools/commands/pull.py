"""`peraxis-tools pull`."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from peraxis_format.urls import is_url
from peraxis_tools.commands.options import json_option, overwrite_option, quiet_option
from peraxis_tools.display.progress import staged
from peraxis_tools.pull import pull
from peraxis_tools.report.console import emit, hub_progress
from peraxis_tools.report.pull import render_pull

__all__ = ["command"]


@click.command("pull")
@click.argument("source", metavar="REPO|URL")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    default=Path(),
    help="The folder for the files.  [default: the current one]",
)
@click.option("--file", "files", multiple=True, metavar="NAME", help="Fetch only this delta of REPO. Repeatable.")
@click.option(
    "--expect-content-id",
    multiple=True,
    metavar="ID",
    help="A content ID that a delta may have. Repeatable.",
)
@overwrite_option
@json_option
@quiet_option
def command(
    source: str,
    output: Path,
    files: tuple[str, ...],
    expect_content_id: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fetch the deltas of REPO (org/name or org/name@revision) or of a URL, and verify them before they are written.

    \b
    Example: peraxis-tools pull me/my-delta --expect-content-id sha256:...
             peraxis-tools apply BASE my-delta.pxd -o model
    """
    hub = contextlib.nullcontext() if is_url(source) else hub_progress(f"{source} (a repository)", quiet=quiet)
    with hub:
        result = pull(
            source,
            output,
            files=files,
            expect_content_id=expect_content_id,
            overwrite=overwrite,
            progress=staged(quiet=quiet),
        )
    emit(result, render_pull, schema="peraxis.pull/1", as_json=as_json, written=output)
