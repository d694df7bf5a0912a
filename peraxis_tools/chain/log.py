"""The verb log: the updates of a folder as a chain, and the files that fold several of them into one."""

from __future__ import annotations

import math
import re
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
    folded = folds(links)
    left_out = {link.path for link in folded}
    ordered = chain_order([link for link in links if link.path not in left_out])
    return ChainLog(
        folder=str(folder), updates=tuple(map(_entry, ordered)), folded=tuple(_entry(link) for link in folded)
    )


def folds(links: Sequence[Link]) -> list[Link]:
    """The updates that a chain of two or more others replaces: one with the same base and the same result."""
    known = {link.content_id for link in links}
    after: dict[str, list[Link]] = {}
    starts: dict[tuple[str, str | None], list[Link]] = {}
    for link in links:
        # The predecessor of an update that names none here follows from its base state.
        named = link.previous is not None and link.previous in known
        after.setdefault(link.previous if named and link.previous else link.base, []).append(link)
        starts.setdefault((link.base, link.previous), []).append(link)

    def is_fold(link: Link) -> bool:
        ahead = [other for other in starts[link.base, link.previous] if other is not link]
        seen = {link.content_id, *(other.content_id for other in ahead)}
        while ahead:
            at = ahead.pop()
            further = (*after.get(at.content_id, ()), *after.get(at.result, ()))
            reached = [other for other in further if other.base == at.result and other.content_id not in seen]
            if any(other.result == link.result for other in reached):
                return True
            seen.update(other.content_id for other in reached)
            ahead += reached
        return False

    return [link for link in links if is_fold(link)]


def _entry(link: Link) -> LogEntry:
    with pxd.open(link.path) as delta:
        weights = sum(math.prod(module.shape) for module in delta.manifest.modules)
        return LogEntry(
            file=link.path.name,
            content_id=link.content_id,
            previous=link.previous,
            base=link.base,
            result=link.result,
            changed=_changed(delta.manifest.metadata.get(CHANGED, ""), weights),
            weights=weights,
            bytes=delta.size,
        )


def _changed(text: str, weights: int) -> int | None:
    """The number of changed weights that a writer noted; None if it is not a valid number."""
    if not re.fullmatch(r"[0-9]{1,16}", text) or int(text) > weights:
        return None
    return int(text)
