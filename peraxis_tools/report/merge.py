"""The text reports of `merge` and `split`."""

from __future__ import annotations

from rich.console import Console

from peraxis_tools.display.shown import counted
from peraxis_tools.merge import MergeResult
from peraxis_tools.report.console import size, text
from peraxis_tools.split import SplitResult

__all__ = ["render_merge", "render_split"]

_METHODS = {"sum": "weighted sum", "linear": "weighted mean"}
_KINDS = {"parts": "parts joined, byte for byte", "sum": "every mask kept", "fit": "fitted into new masks"}


def render_merge(result: MergeResult, console: Console) -> None:
    """Print the path, the inputs, and the error."""
    how = "" if result.method is None else f"{_METHODS.get(result.method, result.method)}, "
    console.print(
        f"[bold green]merged[/]  {text(result.path)}  {size(result.bytes)} of {size(result.full_bytes)}, "
        f"{how}{_KINDS[result.kind]}"
    )
    console.print(f"        {text(result.content_id)}")
    for part in result.inputs:
        weight = "part" if part.weight is None else f"{part.weight:g}"
        console.print(f"{weight:>6}  {text(part.path)}\n        {text(part.content_id)}")
    if result.kind == "fit":
        console.print(f"masks   {result.masks_max} per module; relative error of the fit [bold]{result.error:.4g}[/]")
        worst = max(result.modules, key=lambda m: m.square_error / m.square_norm if m.square_norm else 0.0)
        if worst.square_norm:
            share = (worst.square_error / worst.square_norm) ** 0.5
            console.print(f"worst   {text(worst.name)}  {share:.4g}")
    elif result.kind == "sum" and result.masks_max:
        console.print(
            f"masks   up to {result.masks_max} per module, each scale rounded to F16 at most once; fewer with --masks"
        )


def render_split(result: SplitResult, console: Console) -> None:
    """Print the parts, one in each line."""
    console.print(f"[bold green]split[/]  into {len(result.parts)} parts\n       {text(result.content_id)}")
    for part in result.parts:
        console.print(f"{text(part.path)}  {counted(part.module_count, 'module')}, {size(part.bytes)}")
