"""The text report of `eval`."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from peraxis_tools.display.shown import counted
from peraxis_tools.evaluate.types import DomainResult, EvaluateResult, TaskResult
from peraxis_tools.report.console import size, text

__all__ = ["render_evaluate", "shown_kl"]

_SPECIAL_SHOWN = 4
_WORST_SHOWN = 3

_LABELS = {"base": "base, no delta", "merged": "merged", "on-the-fly": "on the fly"}


def render_evaluate(result: EvaluateResult, console: Console) -> None:
    """Print a table for each text with a line for each candidate, then the tasks."""
    console.print(f"[bold]{text(result.delta)}[/]  {size(result.bytes)}  {text(result.content_id)}")
    console.print(f"against {text(result.fine_tuned)}, base {text(result.base)}")
    if result.other_fine_tune is not None:
        console.print(f"[yellow]{text(result.fine_tuned)} {text(result.other_fine_tune)}[/]")
    for domain in result.domains:
        console.print(_domain_title(domain))
        console.print(_domain_table(domain))
        for line in _tail_lines(domain):
            console.print(line)
    if result.tasks:
        console.print(_task_table(result.tasks))


def shown_kl(kl: float, form: str = ".3g") -> str:
    """KL as it is shown: 0 where rounding of the sums made it negative."""
    return format(kl if math.isnan(kl) else max(0.0, kl), form)


def _domain_title(domain: DomainResult) -> str:
    seen = "  [yellow]the delta was fitted on a text of this name: not held out[/]" if domain.seen else ""
    count = f"{domain.samples} x {domain.sequence_length} tokens"
    return f"\n[bold]{text(domain.domain)}[/]  {text(domain.source)}, {count}{seen}"


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, title in enumerate(titles):
        table.add_column(title, justify="right" if i else "left", min_width=8 if i else 15)
    return table


def _domain_table(domain: DomainResult) -> Table:
    table = _table("", "KL", "±", "99%", "top-1", "perplexity", "recovered")
    for name, its in domain.candidates.items():
        recovered = domain.recovered.get(name)
        table.add_row(
            _LABELS[name],
            shown_kl(its.kl),
            "" if its.kl_error is None else f"{its.kl_error:.1g}",
            shown_kl(its.tail.percentile_99),
            f"{100 * its.top1:.1f}%",
            f"{its.perplexity:.4g}",
            "-" if recovered is None else f"{100 * recovered:.1f}%",
        )
    table.add_row("fine-tuned", "", "", "", "", f"{domain.perplexity_fine_tuned:.4g}", "")
    return table


def _tail_lines(domain: DomainResult) -> Iterator[str]:
    """The places where the merged model differs most: special tokens, and the worst positions with their context."""
    merged = domain.candidates.get("merged")
    if merged is None:
        return
    for token in sorted(merged.tail.special, key=lambda token: -token.kl)[:_SPECIAL_SHOWN]:
        yield f"after {text(repr(token.text))}  KL {shown_kl(token.kl)}, {counted(token.count, 'time')}"
    for worst in merged.tail.worst[:_WORST_SHOWN]:
        yield f"worst  KL {shown_kl(worst.kl)} after {text(repr(worst.text[-60:]))}"


def _task_table(tasks: tuple[TaskResult, ...]) -> Table:
    models = list(tasks[0].scores)
    table = _table("task", "metric", *models)
    for task in tasks:
        cells = []
        for model in models:
            error = task.errors.get(model)
            cells.append(f"{100 * task.scores[model]:.1f}" + ("" if error is None else f" ± {100 * error:.1f}"))
        table.add_row(text(task.task), text(task.metric), *cells)
    return table
