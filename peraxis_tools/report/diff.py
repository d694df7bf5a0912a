"""The text report of `diff`: the verdict and totals first, then the modules that differ most."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from peraxis_tools.diff import DiffResult, GroupDiff, ModuleDiff
from peraxis_tools.diff.result import NEEDS_BASE
from peraxis_tools.display.shown import listed
from peraxis_tools.report.console import text

__all__ = ["render_diff"]

_NAMES_SHOWN = 8
_CHANGES_SHOWN = 12
_WIDTH = 30  # characters of a value
_BEFORE = 8  # characters before a difference


def render_diff(result: DiffResult, console: Console, *, top: int) -> None:
    """Print verdict, groups, the `top` modules that differ most, and the manifest."""
    total = result.total
    if result.equal:
        console.print("[bold green]equal[/]      the same content")
    else:
        console.print(
            f"[bold yellow]different[/]  {total.different} of {total.module_count} modules differ; "
            f"relative distance [bold]{_number(total.relative)}[/], signs agree {_percent(total.sign_agreement)}"
        )
    for label, name, content_id in (("a", result.a, result.content_id_a), ("b", result.b, result.content_id_b)):
        console.print(f"{label}  {text(name)}\n   {text(content_id or 'a checkpoint')}")
    if total.measured < total.module_count and not result.equal:
        why = "exact tensors need --base" if _needs_base(result) else "the others have no delta to one base"
        console.print(f"distances are over {total.measured} of {total.module_count} modules: {why}")
    for label, names in (("a", result.only_in_a), ("b", result.only_in_b)):
        if names:
            console.print(f"only in {label}: {text(listed(names, _NAMES_SHOWN))}")
    if total.different:
        console.print(_groups(result))
        if top:
            console.print(_modules(_worst(result, top), console.width))
    _manifest(result, console)


def _needs_base(result: DiffResult) -> bool:
    return any(module.note == NEEDS_BASE for module in result.modules)


def _manifest(result: DiffResult, console: Console) -> None:
    """Print the fields of the manifest that differ; they follow the results, because most only record a run."""
    if result.manifest_changes:
        console.print("[bold]manifest[/]")
    for change in result.manifest_changes[:_CHANGES_SHOWN]:
        console.print(f"{text(change.field)}: {' -> '.join(_around_difference(change.a, change.b))}")
    if len(result.manifest_changes) > _CHANGES_SHOWN:
        console.print(f"and {len(result.manifest_changes) - _CHANGES_SHOWN} more fields of the manifest (--json)")


def _worst(result: DiffResult, top: int) -> list[ModuleDiff]:
    """The modules with an unknown distance first, then by decreasing relative distance."""
    different = [module for module in result.modules if not module.identical]
    return sorted(different, key=lambda m: (m.relative is not None, -(m.relative or 0.0)))[:top]


def _groups(result: DiffResult) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("group", min_width=16)
    for title in ("modules", "differ", "signs agree", "rel. distance"):
        table.add_column(title, justify="right")
    for row in (*result.by_group, result.total):
        table.add_row(text(row.label), *_group_cells(row))
    return table


def _group_cells(row: GroupDiff) -> tuple[str, ...]:
    return str(row.module_count), str(row.different), _percent(row.sign_agreement), _number(row.relative)


def _modules(modules: list[ModuleDiff], width: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", width=min(width, 80))
    table.add_column("differ most", overflow="fold", ratio=1)
    for title in ("signs", "scale", "rel. distance"):
        table.add_column(title, justify="right", no_wrap=True)
    for module in modules:
        notes = [*module.changes, *([module.note] if module.note else [])]
        name = text(module.name) + "".join(f"\n  {text(note)}" for note in notes)
        scale = "-" if module.scale_change is None else f"x{module.scale_change:.3g}"
        table.add_row(name, _percent(module.sign_agreement), scale, _number(module.relative))
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _around_difference(a: str | None, b: str | None) -> tuple[str, str]:
    """Both texts, cut around their first difference."""
    both = zip(a or "", b or "", strict=False)
    same = next((i for i, (x, y) in enumerate(both) if x != y), min(len(a or ""), len(b or "")))
    begin = same - _BEFORE if same > _BEFORE and max(len(a or ""), len(b or "")) > _WIDTH else 0
    return _cut(a, begin), _cut(b, begin)


def _cut(value: str | None, begin: int) -> str:
    if value is None:
        return "-"
    shown = ("…" if begin else "") + value[begin:]
    return text(shown if len(shown) <= _WIDTH else shown[: _WIDTH - 1] + "…")
