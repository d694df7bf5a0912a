"""`peraxis-tools convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

import peraxis_format as pxd
from peraxis_tools.apply import apply
from peraxis_tools.chain import UpdateResult
from peraxis_tools.commands.options import (
    Finite,
    json_option,
    overwrite_option,
    prefer_option,
    quiet_option,
    refuse_given,
)
from peraxis_tools.commands.sources import fetched, updates_of
from peraxis_tools.convert import (
    DEFAULT_RANK,
    LAYOUTS,
    WIRES,
    Layout,
    LoraResult,
    ToPxdResult,
    ToWireResult,
    WireName,
    convert,
    recognised,
)
from peraxis_tools.convert.torch_files import is_torch_file
from peraxis_tools.display.progress import staged
from peraxis_tools.errors import ToolError
from peraxis_tools.report.apply import render_apply
from peraxis_tools.report.console import emit
from peraxis_tools.report.convert import render_lora, render_to_pxd, render_to_wire
from peraxis_tools.report.update import render_update

__all__ = ["command"]


@click.command("convert")
@click.argument("source", metavar="SOURCE")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The file or folder to write.")
@click.option("--base", metavar="FOLDER|ID", help="The base of the delta. Optional for LoRA.")
@click.option(
    "--from",
    "layout",
    type=click.Choice(["auto", *LAYOUTS, *WIRES]),
    default="auto",
    show_default=True,
    help="The format of SOURCE; auto recognises it.",
)
@click.option(
    "--axis", type=click.Choice(["row", "col"]), help="The variant to take if a .pt file holds both for a module."
)
@click.option(
    "--to",
    "target",
    type=click.Choice(["pxd", "lora", "checkpoint", *WIRES]),
    help="The format to write.  [default: pxd, from another format]",
)
@click.option("--rank", type=click.IntRange(min=1), help=f"The rank of the LoRA adapter.  [default: {DEFAULT_RANK}]")
@click.option(
    "--max-error",
    type=Finite(1e-6, 1, max_open=True),
    help="Choose each rank so that the relative error stays below this.",
)
@click.option("--name", help="The name of the fine-tuned checkpoint.")
@click.option(
    "--after",
    multiple=True,
    metavar="PXD|FOLDER|URL",
    help="Updates on the base before the step of a wire. Repeatable.",
)
@prefer_option
@overwrite_option
@json_option
@quiet_option
def command(
    source: str,
    output: Path,
    base: str | None,
    layout: Literal["auto"] | Layout | WireName,
    axis: Literal["row", "col"] | None,
    target: Literal["pxd", "lora", "checkpoint"] | WireName | None,
    rank: int | None,
    max_error: float | None,
    name: str | None,
    after: tuple[str, ...],
    prefer: pxd.Prefer,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert a .pt delta (of BitDelta or of the paper's code) to a .pxd, or a .pxd to a LoRA adapter or a checkpoint.

    Only tensors are read from a .pt file; code in it is not run. A LoRA adapter is an approximation; its error is
    shown.

    One training step is converted bit for bit between an exact update and the wire formats of other systems:
    index-value (vLLM, verl, prime-rl), nemo-rl, and xor (slime, SkyRL). --base is the state before the step.

    \b
    Example: peraxis-tools convert diff.pt --base meta-llama/Llama-2-7b-hf -o delta.pxd
             peraxis-tools convert delta.pxd --to lora --rank 64 -o adapter
             peraxis-tools convert weight_v000124 --base step-123 -o step-000124.pxd
             peraxis-tools convert step-000124.pxd --to index-value --base step-123 -o step-124.safetensors
    """
    _check_asked(source, target, base, layout)
    step = staged(quiet=quiet)
    with fetched([source], quiet=quiet) as (path,), updates_of(after, quiet=quiet) as before:
        wire = _wire(path, layout) if target in ("pxd", None) else None
        if wire is not None:
            refuse_given("axis", why=f"with the wire {wire}")
        elif target not in WIRES:
            refuse_given("after", "prefer", why="without a wire")
        if target == "checkpoint":
            applied = apply(base or "", path, output, overwrite=overwrite, progress=step)
            emit(applied, render_apply, schema="peraxis.apply/1", as_json=as_json, written=output)
            return
        result = convert(
            path,
            output,
            to=target or "pxd",
            base=base,
            layout=wire or (None if layout == "auto" else layout),
            axis=axis,
            name=name,
            rank=rank,
            max_error=max_error,
            after=before,
            prefer=prefer,
            overwrite=overwrite,
            progress=step,
        )
    match result:
        case UpdateResult():
            emit(result, render_update, schema="peraxis.update/1", as_json=as_json, written=output)
        case ToWireResult():
            emit(result, render_to_wire, schema="peraxis.convert-wire/1", as_json=as_json, written=output)
        case LoraResult():
            emit(result, render_lora, schema="peraxis.convert-lora/1", as_json=as_json, written=output)
        case ToPxdResult():
            emit(result, render_to_pxd, schema="peraxis.convert/1", as_json=as_json, written=output)


def _check_asked(source: str, target: str | None, base: str | None, layout: str) -> None:
    """Raise ToolError for a source, a base or an option that does not go with the target."""
    if target in ("pxd", None) and source.partition("?")[0].endswith(".pxd"):
        raise ToolError(f"{source}: is already a .pxd; pass --to lora or --to checkpoint")
    if target in ("pxd", None):
        _refuse_other(source, layout)
    if target in ("pxd", "checkpoint", None) and base is None:
        raise ToolError(f"{source}: pass --base, the checkpoint that this delta is for")
    if target in WIRES and base is None:
        raise ToolError(f"{source}: pass --base, the state that this update was made on")
    if target != "lora":
        refuse_given("rank", "max_error", why="without --to lora")
    if target not in ("pxd", None):
        refuse_given("layout", "axis", "name", "prefer", why=f"with --to {target}")


def _refuse_other(source: str, layout: str) -> None:
    """Raise ToolError for a file or folder on this machine that is neither a .pt file nor a wire."""
    path = Path(source)
    if layout != "auto" or not path.exists() or recognised(path) is not None:
        return
    if path.is_dir() and any(path.glob("*.safetensors")):
        pxd.Safetensors.open(path).close()  # its error names a LoRA adapter
        raise ToolError(
            f"{source}: is a checkpoint and not a delta, nor an xor wire (its index has no delta_encoding); "
            "make a delta of it with `compress`"
        )
    if path.is_file() and not is_torch_file(path):
        raise ToolError(f"{source}: is neither a .pt delta nor a .pxd nor a wire; pass one of these")


def _wire(path: Path, layout: Literal["auto"] | Layout | WireName) -> WireName | None:
    """The requested wire, or, if none is requested, that of the source."""
    if layout == "auto":
        found = recognised(path)
        if found is None and path.is_dir():
            raise ToolError(f"{path}: is a folder but not an xor wire (its index has no delta_encoding); pass a file")
        return found
    return next((item for item in WIRES if item == layout), None)
