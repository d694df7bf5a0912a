"""The text report of `publish`."""

from __future__ import annotations

from rich.console import Console

from peraxis_tools.publish import PublishResult
from peraxis_tools.report.console import text

__all__ = ["render_publish"]


def render_publish(result: PublishResult, console: Console) -> None:
    """Print the place and the content of the repository."""
    if result.url is None:
        console.print(f"[bold yellow]not uploaded[/] (dry run)  {text(result.path)}")
    else:
        console.print(f"[bold green]published[/]  {text(result.url)}")
    for delta in result.deltas:
        console.print(f"delta    {text(delta.name)}")
        console.print(f"content  {text(delta.content_id)}")
    console.print(f"files    {text(', '.join(result.files))}")
    if "base_model" in result.missing:
        console.print("missing  base_model (--base-id gives it)")
    others = [name for name in result.missing if name != "base_model"]
    if others:
        them = "it" if len(others) == 1 else "them"
        console.print(f"missing  {', '.join(others)} (--card-from gives {them})")
