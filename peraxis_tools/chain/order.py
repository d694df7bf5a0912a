"""The order of a chain of updates, from their manifests alone (SPEC 3.14).

An update follows the one that its `previous` names, or, if it names none, the one whose result is its base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import peraxis_format as pxd
from peraxis_tools.deltas.parts import refuse_part
from peraxis_tools.errors import CheckFailedError, ToolError

__all__ = ["Link", "beside_chain", "chain_order", "link_from", "link_of", "predecessors"]

_NAMES: Final = 3  # files that an error names at most
_UNFORK: Final = "leave one of them out, or write it again with `update --after`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The place of one update, from its header. base, result: digests over all tensors before and after.

    is_anchor: whether it is an anchor, which is a whole state that needs no base.
    """

    path: Path
    content_id: str
    previous: str | None
    base: str
    result: str
    is_anchor: bool = False


def link_of(path: str | Path) -> Link:
    """Read the header of an update. Raises PxdError, and ToolError for a delta without a result."""
    with pxd.open(path) as delta:
        return link_from(path, delta.manifest)


def link_from(path: str | Path, manifest: pxd.Manifest) -> Link:
    """The link of a manifest. Raises ToolError for a delta without a result, and for a part of one."""
    refuse_part(manifest, path)
    if manifest.result is None:
        raise ToolError(f"{path}: has no result, so it is not an update; write it with `update`")
    return Link(
        path=Path(path),
        content_id=manifest.content_id,
        previous=manifest.previous,
        base=manifest.base.digest,
        result=manifest.result,
        is_anchor=all(module.base is None for module in manifest.modules),
    )


def chain_order(links: Iterable[Link]) -> list[Link]:
    """The order in which these updates follow each other.

    Raises CheckFailedError with the files' names for an update given twice, a fork, a gap, a cycle, and an update whose
    base is not the result of the one before it.
    """
    given = list(links)
    if not given:
        raise ToolError("no updates are given; pass at least one")
    by_id: dict[str, Link] = {}
    for link in given:
        if link.content_id in by_id:
            raise CheckFailedError(_repeated(link.path, by_id[link.content_id].path))
        by_id[link.content_id] = link
    before = predecessors(given)
    first = [link for link in given if before[link.content_id] is None]
    after: dict[str, Link] = {}
    for link in given:
        known = before[link.content_id]
        if known is None:
            continue
        if known.content_id in after:
            other = after[known.content_id]
            raise CheckFailedError(f"{link.path} and {other.path}: a fork; both follow {known.path}; {_UNFORK}")
        after[known.content_id] = link
        if link.base != known.result:
            raise CheckFailedError(f"{link.path}: follows {known.path}, but was not made on its result")
    _refuse_gaps(first, given)
    ordered = [first[0]]
    while ordered[-1].content_id in after:
        ordered.append(after[ordered[-1].content_id])
    if len(ordered) < len(given):
        left = next(link for link in given if link not in ordered)
        raise CheckFailedError(f"{left.path}: a ring; following its predecessors leads back to it")
    return ordered


def _repeated(path: Path, other: Path) -> str:
    """The error of an update that is given twice. The caller of a folder passed it once, so a copy must go."""
    in_one_folder = path != other and path.parent == other.parent
    return f"{path}: is the same update as {other}; {'delete one of them' if in_one_folder else 'pass it once'}"


def predecessors(links: Sequence[Link], *, strict: bool = True) -> dict[str, Link | None]:
    """By content ID the update that each of these follows; None if it is not among them.

    One that could follow several raises CheckFailedError, or, if not `strict`, follows the first of them.
    """
    by_id = {link.content_id: link for link in links}
    known = _Known(links)
    return {link.content_id: _before(link, by_id, known, strict=strict) for link in links}


def beside_chain(links: Sequence[Link]) -> set[Link]:
    """Return the updates of a folder that its chain does not use: updates that fold several others, repeated anchors,
    anchors in the middle of the chain, and the unusable start of a chain whose pruning was interrupted.
    """
    first: dict[str, Link] = {}
    # A trainer whose state does not change, or comes back, writes equal anchors.
    beside = {link for link in links if first.setdefault(link.content_id, link) is not link and link.is_anchor}
    beside.update(_folds([link for link in links if link not in beside]))
    return beside | _cut_off([link for link in links if link not in beside])


def _cut_off(links: Sequence[Link]) -> set[Link]:
    """Return the anchors whose state other updates reach. If the start of the chain is missing, also return everything
    before the first usable anchor.
    """
    before = predecessors(links, strict=False)
    reaching = {link.result: link for link in links if not link.is_anchor}
    used = set(before.values())
    anchors = [link for link in links if link.is_anchor and link.result in reaching and link not in used]
    if not anchors or not _lacks_its_start([link for link in links if link not in anchors], before):
        return set(anchors)
    ways = [(anchor, _way_to(reaching[anchor.result], before)) for anchor in anchors]
    start, unusable = min(ways, key=lambda each: len(each[1]))
    return set(anchors) - {start} | set(unusable)


def _lacks_its_start(links: Sequence[Link], before: Mapping[str, Link | None]) -> bool:
    """Whether these updates begin with a single one that follows an update which is not here."""
    first = [link for link in links if before[link.content_id] is None]
    return len(first) == 1 and not first[0].is_anchor and first[0].previous is not None


def _way_to(link: Link, before: Mapping[str, Link | None]) -> list[Link]:
    """The updates from this one back to the first."""
    way: dict[Link, None] = {}
    at: Link | None = link
    while at is not None and at not in way:
        way[at] = None
        at = before[at.content_id]
    return list(way)


def _folds(links: Sequence[Link]) -> list[Link]:
    """The updates that a chain of two or more others replaces: one with the same base and the same result."""
    known = {link.content_id for link in links}
    after: dict[str, list[Link]] = {}
    starts: dict[tuple[str, str | None], list[Link]] = {}
    for link in links:
        # The predecessor of an update that names none here follows from its base state.
        named = link.previous is not None and link.previous in known
        after.setdefault(link.previous if named and link.previous else link.base, []).append(link)
        starts.setdefault((link.base, link.previous), []).append(link)

    replaced: set[str] = set()
    for members in starts.values():
        if len(members) > 1:
            reached = _reached(members, after)
            replaced |= {link.content_id for link in members if reached.get(link.result, set()) - {link.content_id}}
    return [link for link in links if link.content_id in replaced]


def _reached(first: Sequence[Link], after: Mapping[str, Sequence[Link]]) -> dict[str, set[str]]:
    """The results of chains that begin with one of these updates and go on with others.

    Returns for each result the content IDs of the updates that such chains begin with, two at most: one of two differs
    from any given update. So each list of successors is walked at most twice.
    """
    own = {link.content_id for link in first}
    walked: dict[str, set[str]] = {}
    reached: dict[str, set[str]] = {}
    ahead = [(link, link.content_id) for link in first]
    while ahead:
        at, origin = ahead.pop()
        for key in (at.content_id, at.result):
            if not _noted(walked, key, origin):
                continue
            for other in after.get(key, ()):
                if other.base == at.result and other.content_id not in own:
                    _noted(reached, other.result, origin)
                    ahead.append((other, origin))
    return reached


def _noted(origins: dict[str, set[str]], key: str, origin: str) -> bool:
    """Note an origin for a key, which has two at most; whether it is new."""
    known = origins.setdefault(key, set())
    if origin in known or len(known) == 2:
        return False
    known.add(origin)
    return True


def _before(link: Link, by_id: Mapping[str, Link], known: _Known, *, strict: bool) -> Link | None:
    named = by_id.get(link.previous or "")
    if named is not None:
        return named
    # Its predecessor is not here: it is the first, or the predecessor is folded into another update.
    later = known.descendants(link)
    candidates = [other for other in known.by_result.get(link.base, ()) if other.content_id not in later]
    if len(candidates) > 1 and strict:
        names = " and ".join(str(other.path) for other in candidates[:_NAMES])
        more = f" and {len(candidates) - _NAMES} more" if len(candidates) > _NAMES else ""
        raise CheckFailedError(
            f"{link.path}: could follow {names}{more}, which have one result", remedy="leave one of them out"
        )
    return candidates[0] if candidates else None


class _Known:
    """Updates by the state after them, and by the update that they name as previous."""

    def __init__(self, given: Sequence[Link]) -> None:
        self.by_result: dict[str, list[Link]] = {}
        self._by_previous: dict[str, list[Link]] = {}
        for link in given:
            self.by_result.setdefault(link.result, []).append(link)
            self._by_previous.setdefault(link.previous or "", []).append(link)

    def descendants(self, link: Link) -> set[str]:
        """The content IDs of a link and of those from which following `previous` leads to it."""
        found, ahead = {link.content_id}, [link]
        while ahead:
            later = [
                other for other in self._by_previous.get(ahead.pop().content_id, ()) if other.content_id not in found
            ]
            found.update(other.content_id for other in later)
            ahead += later
        return found


def _refuse_gaps(first: Sequence[Link], given: Sequence[Link]) -> None:
    if not first:
        raise CheckFailedError(
            f"{given[0].path}: a ring; each of these updates begins at the result of another one; write updates that "
            "return to an earlier state with `--after`, which names those before them"
        )
    if len(first) == 1:
        return
    same = [link for link in first if link.base == first[0].base]
    if len(same) > 1:
        raise CheckFailedError(f"{same[1].path} and {same[0].path}: a fork; both were made on one state; {_UNFORK}")
    # The link that names a predecessor is the one whose predecessor is missing.
    late = next((link for link in first if link.previous is not None), first[1])
    wanted = f"update {late.previous}" if late.previous else f"an update that results in {late.base}"
    raise CheckFailedError(f"{late.path}: a gap; {wanted} is missing in front of it")
