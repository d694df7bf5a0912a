"""The updates beside a new one: a folder of updates, here or at a URL, must keep one order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

import peraxis_format as pxd
from peraxis_format import is_stream, name_lock
from peraxis_tools.chain.order import Link, beside_chain, chain_order, link_from, link_of, predecessors
from peraxis_tools.display.notes import note
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.outputs.remote_output import names_beside
from peraxis_tools.remote.files import RemoteFile
from peraxis_tools.remote.urls import local_path, without_secrets

__all__ = ["OrderFault", "note_repeated", "order_fault", "own_turn", "refuse_disorder", "refuse_other_name"]

_NEW: Final = "the new update"  # its content ID, which is not known before it is written
_TURN: Final = "00c4a117"  # the lock's name
_TURN_SECONDS: Final = 600.0  # that a run waits for one other process, which copies a whole file in its turn
_AFTER: Final = "pass the updates before this one with after (--after)"


def refuse_disorder(output: str | Path, *, previous: str | None, base: str, result: str) -> None:
    """Refuse an update that would be a fork or a ring with other updates of its folder, here or at a URL, or that
    continues the chain of a trainer there under another name than that of the next step.

    previous: content ID of the update before it. base, result: digests over all tensors before and after it. Of a URL
    only headers are fetched. Raises CheckFailedError, ToolError if the URL cannot be read.
    """
    here = local_path(output)
    shown = without_secrets(str(output)) if here is None else str(here)
    new = Link(path=Path(shown), content_id=_NEW, previous=previous, base=base, result=result)
    links = list(_remote_links(str(output)) if here is None else _links(here.parent))
    others = [link for link in links if link.path.name != new.path.name]
    _refuse(shown, new, others)


def note_repeated(output: str | Path, *, previous: str | None, base: str, result: str) -> None:
    """Note that a fold repeats an update of its folder: it has the same place and result. Arguments: see above."""
    here = local_path(output)
    shown = without_secrets(str(output)) if here is None else str(here)
    for link in _remote_links(str(output)) if here is None else _links(here.parent):
        if link.path.name != Path(shown).name and (link.previous, link.base, link.result) == (previous, base, result):
            note(_repeats(shown, link))


def _repeats(shown: str, twin: Link) -> str:
    return f"{shown}: repeats {twin.path}, so `log` and `apply` will refuse the folder; delete one of them"


def refuse_other_name(output: str | Path, before: Link) -> None:
    """Refuse an update that continues the chain of a trainer, here or at a URL, under another name than that of the
    next step: the trainer and its servers would pass over it. `refuse_disorder` does so too, when the update is made.

    before: the update before it. Raises CheckFailedError, ToolError if the URL cannot be read.
    """
    here = local_path(output)
    shown = without_secrets(str(output)) if here is None else str(here)
    paths = names_beside(str(output)) if here is None else [str(path) for path in sorted(here.parent.glob("*.pxd"))]
    others = [path for path in paths if PurePosixPath(path).name != Path(shown).name]
    if not any(map(_is_anchor_name, others)):
        return
    others.sort(key=lambda path: PurePosixPath(path).name != before.path.name)  # its own name first: each read costs
    links = map(_remote_link if here is None else _local_link, others)
    found = next((link for link in links if link is not None and link.content_id == before.content_id), None)
    if found is not None:
        _check_name(shown, found)


def _is_anchor_name(path: str) -> bool:
    return (pxd.step_of(PurePosixPath(path).name) or (0, False))[1]


def _check_name(shown: str, before: Link) -> None:
    """Raise CheckFailedError unless an update has the name of the step after the one before it."""
    place = pxd.step_of(before.path.name)
    if place is None:
        raise CheckFailedError(
            f"{shown}: follows {before.path.name} of a trainer's chain, which does not have the name of its step, so "
            "the trainer and its servers pass over it; rename it first"
        )
    name = pxd.step_name(place[0] + 1)
    if pxd.step_of(Path(shown).name) != (place[0] + 1, False):
        raise CheckFailedError(
            f"{shown}: follows {before.path.name} of a trainer's chain, so the trainer and its servers would pass "
            f"over it under this name; write it to {name}"
        )


@contextlib.contextmanager
def own_turn(output: Path) -> Iterator[None]:
    """Wait until no other run checks the folder of an output and writes into it.

    Raises OSError, and ToolError if one process does so for too long.
    """
    if is_stream(output):
        yield
        return
    holder, since = "", 0.0
    while True:
        with name_lock(output.parent, _TURN) as other:
            if other is None:
                yield
                return
        who = f"process {other}" if other else "another process"
        if not holder:
            note(f"{output}: waits for {who}, which is writing into its folder")
        if who != holder:
            holder, since = who, time.monotonic()
        elif time.monotonic() - since >= _TURN_SECONDS:
            told = f"another run ({who}) is writing into its folder; wait for its end or choose another folder"
            raise ToolError(f"{output}: {told}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderFault:
    """The reason why the updates of a folder are not one chain.

    certain: whether they are meant as one: a file names the one before it, or has the name of a step or an anchor.
    Otherwise they may be releases side by side: variants of one state, updates of variants, or whole states.
    """

    reason: str
    certain: bool


def order_fault(folder: Path) -> OrderFault | None:
    """The fault in the order of a folder's updates; None if they are one chain, or if other files are among them."""
    paths = sorted(folder.glob("*.pxd"))
    links = list(_links(folder))
    if len(links) < max(2, len(paths)):
        return None
    beside = beside_chain(links)
    try:
        chain_order([link for link in links if link not in beside])
    except CheckFailedError as error:
        return OrderFault(reason=str(error), certain=_is_chain(links))
    return None


def _is_chain(links: Sequence[Link]) -> bool:
    return any(link.previous is not None or pxd.step_of(link.path.name) is not None for link in links)


def _links(folder: Path) -> Iterator[Link]:
    """Return the links of the updates in a folder; other files are passed over."""
    yield from filter(None, map(_local_link, sorted(folder.glob("*.pxd"))))


def _local_link(path: str | Path) -> Link | None:
    with contextlib.suppress(pxd.PxdError, ToolError, OSError):
        return link_of(path)
    return None


def _remote_links(url: str) -> Iterator[Link]:
    """`_links` of the folder of a URL, by file names. Raises ToolError if the store cannot be read."""
    yield from filter(None, map(_remote_link, names_beside(url)))


def _remote_link(url: str) -> Link | None:
    try:
        manifest = RemoteFile(url).header()[1]
    except pxd.PxdError:
        return None
    except ToolError:
        if url in names_beside(url):
            raise
        return None  # it was deleted meanwhile
    with contextlib.suppress(ToolError):  # a delta that is no update
        return link_from(PurePosixPath(url).name, manifest)
    return None


def _refuse(shown: str, new: Link, links: list[Link]) -> None:
    # An update with the result of a chain is no fork: it replaces the chain.
    beside = beside_chain([*links, new])
    if new in beside:
        return
    kept = [link for link in links if link not in beside]
    try:
        known = predecessors(kept)
    except CheckFailedError:
        return  # the folder was not one chain before this update
    twin = _twin(new, kept, known)
    if twin is not None:
        note(_repeats(shown, twin))
        return
    try:
        before = predecessors([*kept, new])
    except CheckFailedError as error:
        raise CheckFailedError(f"{shown}: its place would not be known ({error.reason})", remedy=_AFTER) from None
    own = at = before[new.content_id]
    for _ in kept:
        at = None if at is None else before[at.content_id]
        if at is new and own is not None:
            raise CheckFailedError(
                f"{shown}: returns to an earlier state, from which {own.path} leads back, so the order would not be "
                f"known; {_AFTER}"
            )
    for link in kept:
        other = before[link.content_id]
        if other is own and (own is not None or link.base == new.base) and link.result != new.result:
            raise CheckFailedError(
                f"{shown}: would be a fork, because {link.path} was made on the same state; to follow that one, pass "
                "it and those before it with after (--after), or write to another folder"
            )
    if own is not None and any(_is_anchor_name(link.path.name) for link in links):
        _check_name(shown, own)
    _note_gap(shown, new, kept)


def _twin(new: Link, links: list[Link], before: Mapping[str, Link | None]) -> Link | None:
    """The update that a new one repeats: in its place it would follow the same one. before: predecessors of `links`."""
    for link in links:
        if (link.base, link.result) != (new.base, new.result):
            continue
        swapped = [other for other in links if other is not link] + [replace(new, content_id=link.content_id)]
        with contextlib.suppress(CheckFailedError):
            if predecessors(swapped)[link.content_id] == before[link.content_id]:
                return link
    return None


def _note_gap(shown: str, new: Link, kept: list[Link]) -> None:
    """Note that an update is no part of the chain in its folder; one before it may be written later."""
    if not kept:
        return
    try:
        chain_order(kept)
        with contextlib.suppress(CheckFailedError):
            chain_order([*kept, new])
            return
    except CheckFailedError:
        return
    note(f"{shown}: does not follow the updates in its folder, so `log` and `apply` will refuse the folder; {_AFTER}")
