"""The updates before an update among given files, so that each of a chain can be checked on its own base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import peraxis_format as pxd
from peraxis_tools.chain.order import Link, beside_chain, link_of, predecessors
from peraxis_tools.errors import ToolError

__all__ = ["Predecessors"]


class Predecessors:
    """The links of files on this machine by content ID; one that cannot be read, or is not an update, has none."""

    def __init__(self, files: Iterable[str | Path]) -> None:
        self.links: dict[str, Link] = {}
        for file in files:
            with contextlib.suppress(pxd.PxdError, ToolError, OSError):
                link = link_of(file)
                self.links[link.content_id] = link
        links = list(self.links.values())
        beside = beside_chain(links)
        self._before = predecessors(links, strict=False)
        self._before |= predecessors([link for link in links if link not in beside], strict=False)
        self._by_result: dict[str, Link] = {}
        for link in self.links.values():
            self._by_result.setdefault(link.result, link)

    def before(self, manifest: pxd.Manifest) -> Link | None:
        """The update that this one follows: the one that it names, or else one that results in its base."""
        if manifest.content_id in self.links:
            return self._before[manifest.content_id]
        return self.links.get(manifest.previous or "") or self._by_result.get(manifest.base.digest)

    def of(self, manifest: pxd.Manifest) -> list[Path]:
        """The updates that lead to the base of this manifest, oldest first; none if its base is no result of them."""
        found: list[Link] = []
        link = self.before(manifest)
        while link is not None and link not in found:
            found.append(link)
            link = self._before[link.content_id]
        return [link.path for link in reversed(found)]
