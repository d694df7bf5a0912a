"""The updates beside a new one: a folder of updates must keep one order."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import peraxis_format as pxd
from peraxis_tools.chain.order import Link, chain_order, folds, link_of
from peraxis_tools.errors import CheckFailedError, ToolError

__all__ = ["order_fault", "refuse_disorder"]

_NEW: Final = "the new update"  # its content ID, which is not known before it is written


def refuse_disorder(output: Path, base: str, result: str) -> None:
    """Refuse an update without a predecessor that would be a fork or a ring with other updates of its folder.

    base, result: digests over all tensors before and after it. Raises CheckFailedError.
    """
    new = Link(path=output, content_id=_NEW, previous=None, base=base, result=result)
    links = [link for link in _links(output.parent) if link.path.name != output.name]
    _refuse_ring(new, links)
    _refuse_fork(new, links)


def order_fault(folder: Path) -> str | None:
    """The reason why the updates of a folder are not one chain; None if they are, or if other files are among them."""
    paths = sorted(folder.glob("*.pxd"))
    links = _links(folder)
    if len(links) < max(2, len(paths)):
        return None
    left_out = {link.content_id for link in folds(links)}
    try:
        chain_order([link for link in links if link.content_id not in left_out])
    except CheckFailedError as error:
        return str(error)
    return None


def _links(folder: Path) -> list[Link]:
    """The links of the updates in a folder; a file that is none has no link."""
    found: list[Link] = []
    for path in sorted(folder.glob("*.pxd")):
        with contextlib.suppress(pxd.PxdError, ToolError, OSError):
            found.append(link_of(path))
    return found


def _refuse_fork(new: Link, links: list[Link]) -> None:
    # An update with the result of a chain is no fork: it replaces the chain.
    left_out = {link.content_id for link in folds([*links, new])}
    if new.content_id in left_out:
        return
    for link in links:
        alike = link.base == new.base and link.previous is None
        if alike and link.result != new.result and link.content_id not in left_out:
            raise CheckFailedError(
                f"{new.path}: would be a fork, because {link.path} was made on the same state; pass the updates so "
                "far as after (--after) to follow them, or write to another folder"
            )


def _refuse_ring(new: Link, links: list[Link]) -> None:
    """Refuse an update from whose result others lead back to its base: all would follow each other."""
    begins = {link.base: (link.result, link.path) for link in links}
    state, through = new.result, None
    for _ in range(len(begins)):
        if state not in begins or state == new.base:
            break
        state, through = begins[state]
    if through is not None and state == new.base:
        raise CheckFailedError(
            f"{new.path}: returns to an earlier state, from which {through} leads back, so the order would "
            "not be known; pass the updates so far as after (--after)"
        )
