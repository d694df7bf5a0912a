"""`peraxis-tools diff`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from peraxis_tools.commands.options import json_option, quiet_option, refuse_given, workers_option
from peraxis_tools.commands.sources import fetched
from peraxis_tools.diff import diff, diff_checkpoint, names_checkpoint
from peraxis_tools.display.progress import staged
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.remote.urls import without_secrets
from peraxis_tools.report.console import emit
from peraxis_tools.report.diff import render_diff

__all__ = ["command"]


@click.command("diff")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--base", metavar="FOLDER|ID", help="The base, needed for exact tensors and if B is a checkpoint.")
@click.option("--top", default=12, show_default=True, type=click.IntRange(min=0), help="The number of modules to list.")
@workers_option("one for each processor; 2 with a checkpoint")
@json_option
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    a: str,
    b: str,
    base: str | None,
    top: int,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare two deltas on one base, or a delta with a fine-tuned checkpoint.

    A is a .pxd. B is a .pxd or a checkpoint (a folder or a hub id), which needs --base. The exit code is 0 if they are
    equal and 1 if they differ.

    \b
    Example: peraxis-tools diff v1.pxd v2.pxd
             peraxis-tools diff v1.pxd my-fine-tune --base meta-llama/Llama-3.1-8B
    """
    if as_json:
        refuse_given("top", why="with --json, which holds all modules")
    against_checkpoint = names_checkpoint(b)
    if Path(a).exists() and names_checkpoint(a):
        other = "pass the delta first" if not against_checkpoint else "diff compares deltas"
        raise ToolError(f"{a}: is a checkpoint and not a delta; {other}, like `diff delta.pxd fine-tuned --base base`")
    if against_checkpoint and base is None:
        raise ToolError(f"{b}: is a checkpoint; pass --base to compare a delta with it")
    step = staged(quiet=quiet)
    with fetched([a] if against_checkpoint else [a, b], quiet=quiet) as paths:
        if against_checkpoint:
            result = diff_checkpoint(paths[0], b, base=base or "", workers=workers, progress=step)
        else:
            result = diff(paths[0], paths[1], base=base, workers=workers, progress=step)
    result = dataclasses.replace(result, a=without_secrets(a), b=without_secrets(b))
    emit(
        result,
        lambda result, console: render_diff(result, console, top=top),
        schema="peraxis.diff/1",
        as_json=as_json,
    )
    if not result.equal:
        ctx.exit(CheckFailedError.exit_status)
