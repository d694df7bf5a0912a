"""The text report of `pull`."""

from __future__ import annotations

from rich.console import Console

from peraxis_tools.pull import PullResult
from peraxis_tools.report.console import size, text

__all__ = ["render_pull"]


def render_pull(result: PullResult, console: Console) -> None:
    """Print the fetched files."""
    for file in result.files:
        verdict = "pulled" if file.content_id is None else "pulled and verified"
        console.print(f"[bold green]{verdict}[/]  {text(file.path)}  {size(file.bytes)}")
        if file.content_id is not None:
            console.print(f"content  {text(file.content_id)}")
