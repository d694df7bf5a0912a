"""The place of a card's files in a chain of updates: an anchor, a first update, or one that follows another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import peraxis_format as pxd
from peraxis_tools.chain.order import Link, link_from, predecessors

__all__ = ["ChainPlace", "places"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainPlace:
    """The place of an update. is_anchor: it needs no base.

    previous: the content ID of the update that it follows; None for the first one. file: the name of that one, and
    first: that of the first one of the chain, each None if it is not among the files.
    """

    is_anchor: bool
    previous: str | None = None
    file: str | None = None
    first: str | None = None


def places(manifests: Mapping[str, pxd.Manifest]) -> dict[str, ChainPlace]:
    """By file name the place of each update among these files. Other deltas have none."""
    links = {name: link_from(name, found) for name, found in manifests.items() if found.result is not None}
    before = predecessors(list(links.values()), strict=False)
    return {name: _place(link, before) for name, link in links.items()}


def _place(link: Link, before: Mapping[str, Link | None]) -> ChainPlace:
    known = None if link.is_anchor else before[link.content_id]
    if link.is_anchor or (known is None and link.previous is None):
        return ChainPlace(is_anchor=link.is_anchor)
    if known is None:
        return ChainPlace(is_anchor=False, previous=link.previous)
    first, seen = known, {link.content_id}
    while (ahead := before[first.content_id]) is not None and not first.is_anchor and first.content_id not in seen:
        seen.add(first.content_id)
        first = ahead
    begins = first.is_anchor or first.previous is None
    return ChainPlace(
        is_anchor=False,
        previous=known.content_id,
        file=known.path.name,
        first=first.path.name if begins else None,
    )
