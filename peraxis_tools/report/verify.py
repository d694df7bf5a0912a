"""The text report of `verify`."""

from __future__ import annotations

from rich.console import Console

from peraxis_tools.report.console import text
from peraxis_tools.verify_files import FileVerdict, Status, VerifyResult

__all__ = ["render_verify"]


_STYLES = {
    Status.PASSED: "[bold green]verified[/]",
    Status.FAILED: "[bold red]failed[/]",
    Status.ERROR: "[bold red]error[/]",
    Status.NOT_VERIFIABLE: "[bold yellow]not verifiable[/]",
}


def render_verify(report: VerifyResult, console: Console) -> None:
    """Print a verdict for each file with its checks, and a sum if there are several files."""
    for verdict in report.files:
        _verdict(verdict, console)
    if len(report.files) > 1:
        passed = sum(verdict.status is Status.PASSED for verdict in report.files)
        console.print(f"{passed} of {len(report.files)} verified")


def _verdict(verdict: FileVerdict, console: Console) -> None:
    console.print(f"{_STYLES[verdict.status]}  {text(verdict.file)}")
    if verdict.content_id is not None:
        console.print(f"  {text(verdict.content_id)}")
    width = max((len(check.status.value) for check in verdict.checks), default=0)
    indent = " " * (2 + 11 + 1 + width + 2)
    for check in verdict.checks:
        found = f"{check.code} {check.message}" if check.code else check.message
        console.print(f"  {check.name:<11} {check.status.value:<{width}}  {text(found or '')}")
        places = (check.field, None if check.offset is None else f"offset {check.offset}")
        where = [place for place in places if place is not None]
        if where:
            console.print(f"{indent}at {text(', '.join(where))} (SPEC {check.clause})")
        if check.remedy is not None:
            console.print(f"{indent}{text(check.remedy)}")
