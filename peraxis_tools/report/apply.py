"""The text report of `apply`."""

from __future__ import annotations

from rich.console import Console

from peraxis_tools.apply import ApplyResult
from peraxis_tools.display.shown import counted, listed
from peraxis_tools.report.console import size, text

__all__ = ["render_apply"]


def render_apply(result: ApplyResult, console: Console) -> None:
    """Print the path of the checkpoint and its files."""
    written = f"{counted(result.tensors, 'tensor')}, {size(result.full_bytes)}"
    console.print(f"[bold green]applied[/]  {text(result.path)}  {written}")
    console.print(f"delta    {text(result.content_id)}")
    console.print(f"files    {text(', '.join(result.files))}")
    if result.left_behind:
        names = text(listed(result.left_behind))
        console.print(f"missing  {names}: the delta does not contain it; copy it from the fine-tuned folder")
