"""How `verify` looks to a person."""

from __future__ import annotations

from rich.console import Console

from peraxis_tools.report.console import size, text
from peraxis_tools.verify import VerifyResult

__all__ = ["render_verify"]


def render_verify(result: VerifyResult, console: Console) -> None:
    """What was proven, a line each."""
    console.print(f"[bold green]verified[/]  {text(result.file)}  {text(result.content_id)}")
    console.print(f"structure and payload: {result.modules} modules, {size(result.bytes)}")
    if result.base is None:
        console.print("base: not checked (pass --base)")
    else:
        console.print(f"base: {text(result.base)} is the one that this delta was made for, to the byte")
