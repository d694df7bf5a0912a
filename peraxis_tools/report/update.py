"""The text reports of update, compact and log."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

import peraxis_format as pxd
from peraxis_tools.chain.log import ChainLog, LogEntry
from peraxis_tools.chain.write import UpdateResult
from peraxis_tools.deltas.blocks import blocks_text
from peraxis_tools.deltas.module_counts import encodings_text
from peraxis_tools.report.console import size, text

__all__ = ["render_compact", "render_log", "render_update"]

_SHOWN = 12  # hex digits of a digest in a table


def render_update(result: UpdateResult, console: Console) -> None:
    """Print the file and the number of changes."""
    _render("updated", result, console)


def render_compact(result: UpdateResult, console: Console) -> None:
    """Print a folded update."""
    _render("folded", result, console)


def _render(word: str, result: UpdateResult, console: Console) -> None:
    console.print(f"[bold green]{word}[/]  {text(result.path)}  {size(result.bytes)} of {size(result.full_bytes)}")
    console.print(f"content  {text(result.content_id)}")
    share = f"{result.changed / result.weights:.2%}" if result.weights else "none"
    console.print(
        f"changed  {result.changed} of {result.weights} weights, {share}; modules: {encodings_text(result.encodings)}"
    )
    if result.blocks:
        console.print(f"blocks   {blocks_text(result.blocks, result.prefer)}")
    console.print(f"result   {text(result.result)}")


def render_log(chain: ChainLog, console: Console) -> None:
    """Print the chain as a table, the oldest first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("update", "changed", "bytes", "result"):
        table.add_column(name, justify="right" if name in ("changed", "bytes") else "left", overflow="fold")
    for entry in _in_order(chain):
        table.add_row(text(entry.name), _changed(entry), size(entry.bytes), text(_short(entry.result)))
    console.print(table)
    console.print(f"made on  {_base(chain.updates[0])}")
    if chain.folded:
        names = ", ".join(entry.name for entry in chain.folded)
        console.print(f"folded   {text(names)}: not needed by the chain")


def _base(first: LogEntry) -> str:
    """The state that a chain was made on. The digest of an anchor's base is that of no tensor at all."""
    return "no base: the chain begins with an anchor" if first.base == pxd.NO_BASE else text(first.base)


def _in_order(chain: ChainLog) -> Iterator[LogEntry]:
    """The updates, each followed by the folded ones with its result."""
    left = list(chain.folded)
    for entry in chain.updates:
        yield entry
        same = [folded for folded in left if folded.result == entry.result]
        yield from same
        left = [folded for folded in left if folded not in same]
    yield from left


def _changed(entry: LogEntry) -> str:
    return "-" if entry.changed is None else f"{entry.changed / max(entry.weights, 1):.2%}"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:_SHOWN]
