"""The text report of the demo: the report of each step's command, and a table at the end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from peraxis_tools.apply import ApplyResult
from peraxis_tools.compress import CompressResult
from peraxis_tools.deltas.inspection import InspectResult
from peraxis_tools.demo import DemoResult, DemoStep
from peraxis_tools.evaluate.types import EvaluateResult
from peraxis_tools.report.apply import render_apply
from peraxis_tools.report.compress import render_compress
from peraxis_tools.report.console import size, text
from peraxis_tools.report.evaluate import render_evaluate, shown_kl
from peraxis_tools.report.inspect import render_inspect
from peraxis_tools.report.verify import render_verify
from peraxis_tools.verify import VerifyResult

__all__ = ["render_demo", "render_step"]


def render_step(step: DemoStep, console: Console) -> None:
    """Print the command, then its report."""
    console.print("" if step.command is None else f"\n[bold cyan]$ peraxis-tools {text(step.command)}[/]")
    match step.result:
        case CompressResult():
            render_compress(step.result, console)
        case InspectResult():
            render_inspect(step.result, console, modules=False)
        case VerifyResult():
            render_verify(step.result, console)
        case ApplyResult():
            render_apply(step.result, console)
        case EvaluateResult():
            render_evaluate(step.result, console)
        case DemoResult():
            render_demo(step.result, console)


def render_demo(result: DemoResult, console: Console) -> None:
    """Print bytes and fidelity, one line for each candidate."""
    domains = list(result.rows[0].fidelity)
    # One space between columns, so that two domains fit into 80 characters.
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("held-out text")
    for title in ("bytes", "ratio", *(f"KL {domain}" for domain in domains), *(f"top-1 {d}" for d in domains)):
        table.add_column(title, justify="right")
    for row in result.rows:
        table.add_row(
            row.label,
            size(row.bytes) if row.bytes else "-",
            f"{row.ratio:.1f}" if row.ratio else "-",
            *(shown_kl(row.fidelity[domain].kl, ".4f") for domain in domains),
            *(f"{row.fidelity[domain].top1:.1%}" for domain in domains),
        )
    console.print("[bold]beside other files of this pair[/]")
    console.print(f"full checkpoint {size(result.full_bytes)}; KL(fine-tuned || other) in nats per token")
    console.print(table)
    axes = ", ".join(f"{axis} {count}" for axis, count in result.axis_counts.items())
    console.print(f"axes of delta.pxd: {axes}; all files stay in {text(result.path)}")
    console.print("\n[bold]try next[/]")
    for words in _next(result.path):
        console.print(f"  peraxis-tools {text(shlex.join(map(str, words)))}")


def _next(folder: Path) -> Iterator[tuple[object, ...]]:
    """Commands that a reader of the demo may run on its files."""
    base, fine_tuned, delta = folder / "base", folder / "fine-tuned", folder / "delta.pxd"
    text_file = folder / "calibration.jsonl"
    yield "compress", base, fine_tuned, "-o", folder / "small.pxd", "--calibration", text_file, "--target-ratio", 12
    yield "diff", delta, folder / "one-mask.pxd"
    yield "inspect", delta, "--tree"
