"""The order of a chain of updates, from their manifests alone (SPEC 3.14).

An update follows the one that its `previous` names, or, if it names none, the one whose result is its base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import peraxis_format as pxd
from peraxis_tools.errors import CheckFailedError, ToolError

__all__ = ["Link", "chain_order", "folds", "link_from", "link_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The place of one update, from its header. base, result: digests over all tensors before and after."""

    path: Path
    content_id: str
    previous: str | None
    base: str
    result: str


def link_of(path: str | Path) -> Link:
    """Read the header of an update. Raises PxdError, and ToolError for a delta without a result."""
    with pxd.open(path) as delta:
        return link_from(path, delta.manifest)


def link_from(path: str | Path, manifest: pxd.Manifest) -> Link:
    """The link of a manifest. Raises ToolError for a delta without a result."""
    if manifest.result is None:
        raise ToolError(f"{path}: has no result, so it is not an update; write it with `update`")
    return Link(
        path=Path(path),
        content_id=manifest.content_id,
        previous=manifest.previous,
        base=manifest.base.digest,
        result=manifest.result,
    )


def chain_order(links: Iterable[Link]) -> list[Link]:
    """The order in which these updates follow each other.

    Raises CheckFailedError with the files' names for an update given twice, a fork, a gap, a cycle, and an update whose
    base is not the result of the one before it.
    """
    given = list(links)
    if not given:
        raise ToolError("no updates are given")
    by_id: dict[str, Link] = {}
    for link in given:
        if link.content_id in by_id:
            raise CheckFailedError(f"{link.path}: is the same update as {by_id[link.content_id].path}")
        by_id[link.content_id] = link
    before = {link.content_id: _before(link, by_id, given) for link in given}
    first = [link for link in given if before[link.content_id] is None]
    after: dict[str, Link] = {}
    for link in given:
        known = before[link.content_id]
        if known is None:
            continue
        if known.content_id in after:
            other = after[known.content_id]
            raise CheckFailedError(f"{link.path} and {other.path}: a fork; both follow {known.path}")
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


def _before(link: Link, by_id: Mapping[str, Link], given: Sequence[Link]) -> Link | None:
    named = by_id.get(link.previous or "")
    if named is not None:
        return named
    # Its predecessor is not here: it is the first, or the predecessor is folded into another update.
    candidates = [other for other in given if other.result == link.base and not _descends(other, link, by_id)]
    if len(candidates) > 1:
        names = " and ".join(str(other.path) for other in candidates)
        raise CheckFailedError(f"{link.path}: could follow {names}, which have one result; leave one of them out")
    return candidates[0] if candidates else None


def _descends(link: Link | None, ancestor: Link, by_id: Mapping[str, Link]) -> bool:
    """Whether a link is this ancestor, or following `previous` from it leads there."""
    seen: set[str] = set()
    while link is not None and link.content_id not in seen:
        if link is ancestor:
            return True
        seen.add(link.content_id)
        link = by_id.get(link.previous or "")
    return False


def _refuse_gaps(first: Sequence[Link], given: Sequence[Link]) -> None:
    if not first:
        raise CheckFailedError(
            f"{given[0].path}: a ring; each of these updates begins at the result of another one. Write updates that "
            "return to an earlier state with `--after`, which says what they follow"
        )
    if len(first) == 1:
        return
    same = [link for link in first if link.base == first[0].base]
    if len(same) > 1:
        raise CheckFailedError(f"{same[1].path} and {same[0].path}: a fork; both were made on one state")
    # The link that names a predecessor is the one whose predecessor is missing.
    late = next((link for link in first if link.previous is not None), first[1])
    wanted = f"update {late.previous}" if late.previous else f"an update that results in {late.base}"
    raise CheckFailedError(f"{late.path}: a gap; {wanted} is missing in front of it")
