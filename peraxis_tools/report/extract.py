"""The text report of `extract`."""

from __future__ import annotations

from rich.console import Console

from peraxis_tools.display.shown import counted
from peraxis_tools.extract import ExtractResult
from peraxis_tools.report.console import size, text

__all__ = ["render_extract"]


def render_extract(result: ExtractResult, console: Console) -> None:
    """Print the folder and its files."""
    written = f"{counted(len(result.files), 'file')}, {size(result.bytes)}"
    console.print(f"[bold green]extracted[/]  {text(result.path)}  {written}")
    console.print(f"content  {text(result.content_id)}")
    console.print(f"files    {text(', '.join(result.files))}")
