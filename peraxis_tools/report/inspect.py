"""The text report of `inspect`."""

from __future__ import annotations

from collections import Counter
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from peraxis_tools.checkpoints.kinds import axes_text
from peraxis_tools.deltas.calibration_text import calibration_text
from peraxis_tools.deltas.inspection import InspectResult, ModuleLine, needs_no_base
from peraxis_tools.deltas.metadata_keys import DISTILLATION_KEY
from peraxis_tools.deltas.parts import JOIN_PARTS, is_part, part_of
from peraxis_tools.display.shown import times_smaller
from peraxis_tools.report.console import size, text

__all__ = ["render_inspect", "wrapped"]

_WIDEST: Final = 120
_PIPED: Final = 80  # columns if the output is not a terminal
_GROUP_WIDTH: Final = 24
_KINDS_SHOWN: Final = 3
_DISTILLATION_WIDTH: Final = 100
_STYLES: Final = {"sign": "green", "exact": "cyan", "full": "yellow", "same": "dim"}


def render_inspect(result: InspectResult, console: Console, *, modules: bool = False, tree: bool = False) -> None:
    """Print a summary, bytes by encoding and by group, and on request a line per module, or a tree."""
    width = min(console.width, _WIDEST) if console.is_terminal else _PIPED
    _summary(result, console)
    tables: list[Table | Tree] = [_bytes_table(result), _group_table(result, width)]
    if tree:
        tables.append(_tree(result))
    elif modules:
        tables.append(_module_table(result, width))
    for table in tables:
        console.print()
        console.print(table)


def _summary(result: InspectResult, console: Console) -> None:
    manifest = result.manifest
    revision = f" @ {text(manifest.base.revision)}" if manifest.base.revision else ""
    console.print(f"[bold]{text(result.path)}[/]  PXD {result.version}")
    console.print(f"[dim]{text(result.content_id)}[/]")
    console.print(f"fine-tuned   {text(manifest.fine_tuned.id)}")
    if needs_no_base(manifest):
        console.print("base         none: this is an anchor, a whole state that needs no base")
    else:
        of = " of the part's tensors" if is_part(manifest) else ""
        console.print(f"base         {text(manifest.base.id)}{revision}  {text(manifest.base.digest[:23])}…{of}")
    if manifest.features:
        console.print(f"result       {text(manifest.result or 'not known without the base')}")
        console.print(f"previous     {text(manifest.previous or 'none')}")
    console.print(
        f"size         {size(result.bytes)} for a checkpoint of {size(result.full_bytes)}: "
        f"[bold green]{times_smaller(result.full_bytes, result.bytes)}[/]"
    )
    console.print(f"             assets {size(result.asset_bytes)}, header and alignment {size(result.overhead_bytes)}")
    part = part_of(manifest, result.path)
    if part is not None:
        console.print(f"part         {part}; {JOIN_PARTS}")
    calibration = manifest.calibration
    if calibration is None:
        console.print("calibration  none")
    else:
        console.print(f"calibration  {text(calibration_text(manifest))}")
        counts = f"{calibration.samples} x {calibration.sequence_length} tokens, seed {calibration.seed}"
        console.print(f"             {counts}")
    if distilled := manifest.metadata.get(DISTILLATION_KEY):
        console.print(f"distilled    {text(distilled[:_DISTILLATION_WIDTH])}")
    console.print(f"written by   {text(manifest.producer.name)} {text(manifest.producer.version)}")
    for label, names in (("tied", [alias for _, alias in manifest.tied]), ("dropped", list(manifest.dropped))):
        if names:
            console.print(f"{label:<12} {text(', '.join(names[:4]))}{' …' if len(names) > 4 else ''}")


def _bytes_table(result: InspectResult) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("encoding", min_width=18)
    for title in ("modules", "stored", "full", "ratio"):
        table.add_column(title, justify="right", min_width=8)
    for share in result.by_encoding:
        table.add_row(
            f"[{_STYLES[share.label]}]{share.label}[/]",
            str(share.module_count),
            size(share.bytes),
            size(share.full_bytes),
            _ratio(share.full_bytes, share.bytes),
        )
    return table


def _ratio(full: int, stored: int) -> str:
    return f"{full / stored:.1f}" if stored else "-"


def _group_table(result: InspectResult, width: int) -> Table:
    """A line for each group, in the order of the file: its encodings and axes."""
    groups: dict[str, list[ModuleLine]] = {}
    for line in result.modules:
        groups.setdefault(line.group, []).append(line)
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = [wrapped(text(name), _GROUP_WIDTH) for name in groups]
    table.add_column("group", min_width=18, no_wrap=True)
    table.add_column("stored as", max_width=max(16, width - 62))
    for title in ("modules", "stored", "full", "ratio"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, lines in zip(names, groups.values(), strict=True):
        stored, full = sum(line.bytes for line in lines), sum(line.full_bytes for line in lines)
        table.add_row(name, _stored_as(lines), str(len(lines)), size(stored), size(full), _ratio(full, stored))
    return table


def _stored_as(lines: list[ModuleLine]) -> str:
    """`sign row+col`, `sign 3x row+col`, or for several kinds of modules their counts: `sign row 40; full 2`."""
    kinds = Counter((line.encoding, axes_text(line.axes)) for line in lines).most_common()
    shown = []
    for (encoding, axes), count in kinds:
        detail = f" {axes}" if axes else ""
        number = f" {count}" if len(kinds) > 1 else ""
        shown.append(f"[{_STYLES[encoding]}]{encoding}[/]{detail}{number}")
    more = f"; {len(shown) - _KINDS_SHOWN} more" if len(shown) > _KINDS_SHOWN else ""
    return "; ".join(shown[:_KINDS_SHOWN]) + more


def wrapped(name: str, width: int) -> str:
    """A dotted name on lines of at most width characters, broken after dots; a longer part has its own line."""
    lines = [""]
    parts = name.split(".")
    for i, part in enumerate(parts):
        piece = part if i == len(parts) - 1 else f"{part}."
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(lines)


def _tree(result: InspectResult) -> Tree:
    """A tree of modules by the parts of their names, with sums of bytes; a single child is on its parent's line."""
    totals: Counter[tuple[str, ...]] = Counter()
    children: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for line in result.modules:
        for path in _prefixes(line.name):
            totals[path] += line.bytes
            children.setdefault(path[:-1], set()).add(path)
    whole = sum(line.bytes for line in result.modules)
    nodes: dict[tuple[str, ...], Tree] = {(): Tree(f"{text(result.path)}  {size(whole)}")}
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
    rows = [
        (_encoding(line), f"{'x'.join(map(str, line.shape)) or 'scalar'} {line.dtype}", size(line.bytes))
        for line in result.modules
    ]
    titles = ("encoding", "shape", "stored")
    taken = sum(max(len(title), *(len(row[i]) for row in rows)) + 2 for i, title in enumerate(titles)) if rows else 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("module", no_wrap=True)
    table.add_column("encoding", no_wrap=True)
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("stored", justify="right", no_wrap=True)
    for line, (encoding, shape, stored) in zip(result.modules, rows, strict=True):
        name = wrapped(text(line.name), max(20, width - taken))
        table.add_row(name, f"[{_STYLES[line.encoding]}]{encoding}[/]", shape, stored)
    return table
