"""`peraxis-tools demo`."""

from __future__ import annotations

from pathlib import Path

import click

from peraxis_tools.commands.options import json_option, quiet_option
from peraxis_tools.demo import demo
from peraxis_tools.display.bars import progress
from peraxis_tools.pair import PairSize
from peraxis_tools.report.console import emit, show
from peraxis_tools.report.demo import render_demo, render_step

__all__ = ["command"]


@click.command("demo")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path(".demo"),
    show_default=True,
    help="The folder for all files.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="The seed of the training.")
@json_option
@quiet_option
def command(folder: Path, seed: int, as_json: bool, quiet: bool) -> None:
    """Train a small pair of models, then compress, inspect, verify, apply and measure it.

    It works offline and takes some minutes on two cores. If it is interrupted, it begins again with the training.

    \b
    Example: peraxis-tools demo --folder /tmp/demo
    """
    size = PairSize()
    with progress("train", size.base_steps + size.fine_tune_steps, unit="steps", quiet=quiet) as step:
        steps = demo(folder, size=size, seed=seed, progress=step)
        first = next(steps)
    if not as_json and not quiet:
        show(first, render_step)
    last = first
    for last in steps:
        if not as_json and not quiet:
            show(last, render_step)
    if as_json or quiet:
        emit(last.result, render_demo, schema="peraxis.demo/1", as_json=as_json)
