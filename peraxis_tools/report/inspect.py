"""How `inspect` looks to a person."""

from __future__ import annotations

from collections import Counter
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from peraxis_tools.inspect import ByteShare, InspectResult, ModuleLine
from peraxis_tools.kinds import axes_text
from peraxis_tools.report.console import size, text

__all__ = ["render_inspect"]

_WIDEST: Final = 120


def render_inspect(result: InspectResult, console: Console, *, modules: bool = True, tree: bool = False) -> None:
    """Summary first, then bytes, axes, and a line a module or a tree of them."""
    _summary(result, console)
    console.print(_bytes_table("encoding", result.by_encoding))
    console.print(_bytes_table("kind", result.by_kind))
    if result.axes:
        console.print(_axes_table(result))
    if tree:
        console.print(_tree(result))
    elif modules:
        console.print(_module_table(result, min(console.width, _WIDEST) if console.is_terminal else 80))


def _summary(result: InspectResult, console: Console) -> None:
    manifest = result.manifest
    revision = f" @ {text(manifest.base.revision)}" if manifest.base.revision else ""
    console.print(f"[bold]{text(result.file)}[/]  PXD {result.version}")
    console.print(text(result.content_id))
    console.print(f"fine-tuned   {text(manifest.fine_tuned.id)}")
    console.print(f"base         {text(manifest.base.id)}{revision}  {text(manifest.base.digest[:23])}…")
    if manifest.features:
        console.print(f"result       {text(manifest.result or 'not known without the base')}")
        console.print(f"previous     {text(manifest.previous or 'none')}")
    console.print(
        f"size         {size(result.file_bytes)} for a checkpoint of {size(result.full_bytes)}: "
        f"[bold]{result.ratio:.1f} times smaller[/]"
    )
    console.print(f"             assets {size(result.asset_bytes)}, header and alignment {size(result.overhead_bytes)}")
    calibration = manifest.calibration
    if calibration is None:
        console.print("calibration  none")
    else:
        console.print(
            f"calibration  {text(calibration.source)}, {calibration.samples} x {calibration.sequence_length} tokens, "
            f"seed {calibration.seed}"
        )
    console.print(f"written by   {text(manifest.producer.name)} {text(manifest.producer.version)}")
    for label, names in (("tied", [alias for _, alias in manifest.tied]), ("dropped", list(manifest.dropped))):
        if names:
            console.print(f"{label:<12} {text(', '.join(names[:4]))}{' …' if len(names) > 4 else ''}")


def _bytes_table(label: str, shares: tuple[ByteShare, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(label, min_width=12)
    for title in ("modules", "stored", "full", "ratio"):
        table.add_column(title, justify="right", min_width=8)
    for share in shares:
        ratio = f"{share.full_bytes / share.bytes:.1f}" if share.bytes else "-"
        table.add_row(share.label, str(share.modules), size(share.bytes), size(share.full_bytes), ratio)
    return table


def _axes_table(result: InspectResult) -> Table:
    columns = [axis for axis in ("row", "col", "row+col", "tensor") if any(axis in a.counts for a in result.axes)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("axis by sub-type", min_width=16)
    for axis in columns:
        table.add_column(axis, justify="right", min_width=8)
    for row in result.axes:
        table.add_row(text(row.subtype), *(str(row.counts.get(axis, 0)) for axis in columns))
    return table


def _tree(result: InspectResult) -> Tree:
    """Modules by the parts of their names, bytes summed upwards; a part with one child stands on its child's line."""
    totals: Counter[tuple[str, ...]] = Counter()
    children: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for line in result.modules:
        for path in _prefixes(line.name):
            totals[path] += line.bytes
            children.setdefault(path[:-1], set()).add(path)
    whole = sum(line.bytes for line in result.modules)
    nodes = {(): Tree(f"{text(result.file)}  {size(whole)}")}
    modules = {tuple(line.name.split(".")): line for line in result.modules}
    for line in result.modules:
        shown: list[str] = []
        for path in _prefixes(line.name):
            shown.append(path[-1])
            here = modules.get(path)
            if here is None and len(children[path]) == 1:
                continue
            if path not in nodes:
                label = f"{text('.'.join(shown))}  {size(totals[path])}"
                above = path[: len(path) - len(shown)]
                nodes[path] = nodes[above].add(label if here is None else f"{label}  [dim]{_encoding(here)}[/]")
            shown = []
    return nodes[()]


def _prefixes(name: str) -> list[tuple[str, ...]]:
    parts = tuple(name.split("."))
    return [parts[:depth] for depth in range(1, len(parts) + 1)]


def _encoding(line: ModuleLine) -> str:
    return f"{line.encoding} {axes_text(line.axes)}" if line.axes else line.encoding


def _module_table(result: InspectResult, width: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", width=width)
    table.add_column("module", overflow="fold", ratio=1)
    table.add_column("encoding", no_wrap=True)
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("stored", justify="right", no_wrap=True)
    for line in result.modules:
        encoding = _encoding(line)
        shape = "x".join(map(str, line.shape)) or "scalar"
        table.add_row(text(line.name), encoding, f"{shape} {line.dtype}", size(line.bytes))
    return table
