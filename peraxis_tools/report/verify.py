"""The text report of `verify`."""

from __future__ import annotations

from typing import Final

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
# The option that asks for a check.
_OPTIONS: Final = {"base": "--base", "signature": "--signature"}


def render_verify(report: VerifyResult, console: Console, *, quiet: bool = False) -> None:
    """Print a verdict for each file with its checks. Several files have a sum, and at the end a list of the failures.

    quiet: print no verdict of a file that is verified.
    """
    failed = [verdict for verdict in report.files if verdict.status is not Status.PASSED]
    for verdict in failed if quiet else report.files:
        _verdict(verdict, console)
    if len(report.files) == 1 or (quiet and not failed):
        return
    console.print(f"{len(report.files) - len(failed)} of {len(report.files)} verified")
    for verdict in [] if quiet else failed:
        console.print(f"{_STYLES[verdict.status]}  {text(verdict.path)}  {verdict.checks[-1].name}")


def _verdict(verdict: FileVerdict, console: Console) -> None:
    console.print(f"{_STYLES[verdict.status]}  {text(verdict.path)}")
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
    for name in verdict.unchecked if verdict.status is Status.PASSED else ():
        console.print(f"  {name:<11} not checked ({_OPTIONS[name]})")
