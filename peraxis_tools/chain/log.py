"""The verb log: the updates of a folder as a chain, and the files that fold several of them into one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peraxis_format as pxd
from peraxis_tools.chain.order import Link, chain_order, link_of
from peraxis_tools.errors import ToolError

__all__ = ["CHANGED", "ChainLog", "LogEntry", "log"]

CHANGED = "peraxis.changed"  # metadata: weights that an update changes


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One update. changed: the number of weights that it changes, None if unknown. bytes: the size of the file."""

    file: str
    content_id: str
    previous: str | None
    base: str
    result: str
    changed: int | None
    weights: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainLog:
    """The updates in order, and those that replace several of them (anchors, folded updates)."""

    folder: str
    updates: tuple[LogEntry, ...]
    folded: tuple[LogEntry, ...]


def log(folder: str | Path) -> ChainLog:
    """Read the headers of every .pxd of a folder. Raises ToolError, PxdError, CheckFailedError for a broken chain."""
    paths = sorted(Path(folder).glob("*.pxd"))
    if not paths:
        raise ToolError(f"{folder}: has no .pxd files")
    links = [link_of(path) for path in paths]
    folds = [link for link in links if is_fold(link, links)]
    ordered = chain_order([link for link in links if link not in folds])
    return ChainLog(
        folder=str(folder), updates=tuple(map(_entry, ordered)), folded=tuple(_entry(link) for link in folds)
    )


def is_fold(link: Link, links: Sequence[Link]) -> bool:
    """Whether a chain of two or more of the others leads from its base to its result."""
    ways: dict[str, list[Link]] = {}
    for other in links:
        if other is not link:
            ways.setdefault(other.base, []).append(other)
    # The states after one of the others, then the states after those.
    ahead = [other.result for other in ways.get(link.base, ())]
    seen: set[str] = set()
    while ahead:
        state = ahead.pop()
        if state in seen:
            continue
        seen.add(state)
        further = [other.result for other in ways.get(state, ())]
        if link.result in further:
            return True
        ahead += further
    return False


def _entry(link: Link) -> LogEntry:
    with pxd.open(link.path) as delta:
        changed = delta.manifest.metadata.get(CHANGED)
        return LogEntry(
            file=link.path.name,
            content_id=link.content_id,
            previous=link.previous,
            base=link.base,
            result=link.result,
            changed=int(changed) if changed is not None and changed.isdecimal() else None,
            weights=sum(math.prod(module.shape) for module in delta.manifest.modules),
            bytes=delta.size,
        )
