"""The verb log: the updates of a folder as a chain, and the files that fold several of them into one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import peraxis_format as pxd
from peraxis_format.hub import hub_name
from peraxis_format.urls import is_url
from peraxis_tools.arguments import check_paths
from peraxis_tools.chain.order import Link, beside_chain, chain_order, link_from
from peraxis_tools.remote.files import RemoteFile, deltas_of, local_copy
from peraxis_tools.remote.urls import without_secrets

__all__ = ["ChainLog", "LogEntry", "log"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One update. changed: the number of weights that it changes, None if unknown. bytes: the size of the file."""

    name: str
    content_id: str
    previous: str | None
    base: str
    result: str
    changed: int | None
    weights: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainLog:
    """The updates in order, and those that the chain does not need (anchors, folded updates, half of a deletion)."""

    path: str
    updates: tuple[LogEntry, ...]
    folded: tuple[LogEntry, ...]


def log(source: str | Path) -> ChainLog:
    """Read the headers of every .pxd of a folder, which may be a URL or a repository on the hub.

    From a URL only headers are fetched. Raises ToolError, PxdError, CheckFailedError for a broken chain.
    """
    check_paths(source=source)
    read = [_read(file) for file in deltas_of(source)]
    entries = dict(read)
    folded = beside_chain(list(entries))
    ordered = chain_order([link for link in entries if link not in folded])
    return ChainLog(
        path=without_secrets(str(source)),
        updates=tuple(entries[link] for link in ordered),
        folded=tuple(entry for link, entry in read if link in folded),
    )


def _read(file: str | Path) -> tuple[Link, LogEntry]:
    if is_url(file) and hub_name(file) is None:
        remote = RemoteFile(str(file))
        _, manifest = remote.header()
        # Only the name, because a URL is not a path, and all of them are in one folder.
        link = link_from(PurePosixPath(remote.url).name, manifest)
        return link, _entry(link, manifest, remote.size)
    with local_copy(file) as path, pxd.open(path) as delta:
        link = link_from(path, delta.manifest)
        return link, _entry(link, delta.manifest, delta.size)


def _entry(link: Link, manifest: pxd.Manifest, size: int) -> LogEntry:
    weights = sum(math.prod(module.shape) for module in manifest.modules)
    return LogEntry(
        name=link.path.name,
        content_id=link.content_id,
        previous=link.previous,
        base=link.base,
        result=link.result,
        changed=_changed(manifest.metadata.get(pxd.CHANGED_KEY, ""), weights),
        weights=weights,
        bytes=size,
    )


def _changed(text: str, weights: int) -> int | None:
    """The number of changed weights that a writer noted; None if it is not a valid number."""
    if not re.fullmatch(r"[0-9]{1,16}", text) or int(text) > weights:
        return None
    return int(text)
