"""The text report of `publish`."""

from __future__ import annotations

from rich.console import Console

from peraxis_tools.publish import PublishResult
from peraxis_tools.report.console import text

__all__ = ["render_publish"]


def render_publish(result: PublishResult, console: Console) -> None:
    """Print the place and the content of the repository."""
    if result.url is None:
        console.print(f"[bold yellow]not uploaded[/] (dry run)  {text(result.folder)}")
    else:
        console.print(f"[bold green]published[/]  {text(result.url)}")
    for delta in result.deltas:
        console.print(f"delta    {text(delta.file)}")
        console.print(f"content  {text(delta.content_id)}")
    console.print(f"files    {text(', '.join(result.files))}")
    if result.missing:
        them = "it" if len(result.missing) == 1 else "them"
        console.print(f"missing  {', '.join(result.missing)} (--card-from gives {them})")
