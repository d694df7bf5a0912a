"""The text report of `sign`."""

from __future__ import annotations

from rich.console import Console

from peraxis_tools.deltas.signatures import SignResult
from peraxis_tools.report.console import text

__all__ = ["render_sign"]


def render_sign(result: SignResult, console: Console) -> None:
    """Print the signed file, the method, and the path of the bundle."""
    console.print(f"[bold green]signed[/]  {text(result.path)}, with a {result.method}")
    console.print(f"        {text(result.content_id)}")
    console.print(f"bundle  {text(result.bundle)}")
