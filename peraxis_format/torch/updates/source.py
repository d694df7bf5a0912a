"""The order of a folder's updates: the way that a trainer continues, the next update of a state, its standing."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from peraxis_format.chain_names import step_name, step_of
from peraxis_format.errors import LiveModelError
from peraxis_format.torch.updates.listing import OtherFile, UpdateFile, listed, misnamed_anchors, missing_folder

__all__ = ["Standing", "Way", "chain_of", "next_update", "other_chain", "reached_step", "standing"]

_LOGGER: Final = logging.getLogger("peraxis")
_NAMES: Final = 3  # files that an error names at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """The way from the newest anchor of a folder to its last state. head: the predecessor of the next update."""

    anchor: UpdateFile
    updates: tuple[UpdateFile, ...]
    head: UpdateFile


def chain_of(folder: Path) -> Way | None:
    """The way to the last state of a folder that a trainer continues; None if the folder has no chain.

    Raises LiveModelError for a file that cannot be read, a gap, updates without an anchor, and updates that continue
    the chain under other names, because the next update would be a fork.
    """
    if (reason := missing_folder(folder)) is not None:
        raise LiveModelError(reason)
    files, others, problems = listed(folder, {})
    if problems:
        raise LiveModelError(f"{next(iter(problems.values()))}; move it away and publish again")
    if misnamed := misnamed_anchors(files):
        raise LiveModelError(next(iter(misnamed.values())))
    anchors = [file for file in files if file.is_anchor]
    if not files and not others:
        return None
    if not anchors:
        raise LiveModelError(
            f"{folder}: has updates but no anchor to begin with, like a chain of `peraxis-tools update`; publish to a "
            "new folder, where the first file is an anchor"
        )
    steps = {file.step: file for file in files if not file.is_anchor}
    head = steps.get(anchors[-1].step, anchors[-1])
    updates: list[UpdateFile] = []
    while (after := steps.get(head.step + 1)) is not None and after.base == head.result:
        updates.append(after)
        head = after
    left = [file for file in files if file.step > head.step]
    _refuse_other_names(head, files, [*left, *others])
    if left:
        raise LiveModelError(f"{left[0].path}: a gap; no file leads to its base state")
    return Way(anchor=anchors[-1], updates=tuple(updates), head=head)


def _refuse_other_names(head: UpdateFile, files: Sequence[UpdateFile], left: Sequence[UpdateFile | OtherFile]) -> None:
    """Raise LiveModelError if some of the files `left` continue the chain from `head` on under other names."""
    names = {file.content_id for file in files if file.step == head.step}
    state, ordered = head.result, list[UpdateFile | OtherFile]()
    ahead = list(left)
    while (after := next((file for file in ahead if file.base == state and _follows(file, names)), None)) is not None:
        ahead.remove(after)
        ordered.append(after)
        names, state = {after.content_id} | (names if after.result == state else set()), after.result or ""
    while ordered and ordered[-1].result == ordered[-1].base:  # nothing is lost without it
        ordered.pop()
    wrong = [
        f"{file.path.name} to {step_name(number)}"
        for number, file in enumerate(ordered, head.step + 1)
        if step_of(file.path.name) != (number, False)
    ]
    if wrong:
        # The last is renamed first, so that none takes the name of another one.
        steps = (
            ", then ".join(wrong[::-1]) if len(wrong) <= _NAMES else f"{wrong[0]}, and the later ones by their order"
        )
        raise LiveModelError(
            f"{head.path.parent}: the updates after {head.path.name} do not have the names of their steps; rename "
            f"{steps}, or move them away"
        )


def _follows(file: UpdateFile | OtherFile, names: Container[str]) -> bool:
    """Whether an update may follow files with these content IDs; one that names none follows from its base."""
    return file.previous is None or file.previous in names


def next_update(
    files: Sequence[UpdateFile], state: str | None, step: int | None, *, skip: Container[Path] = ()
) -> UpdateFile | None:
    """The update that continues a state; else the newest anchor ahead of it. skip: files that cannot be used.

    state: the digest over all tensors, None where it is not known. step: of the state, None where it is of no chain.
    """
    usable = [file for file in files if file.path not in skip]
    at = -1 if step is None else step
    for file in usable:
        if not file.is_anchor and state is not None and file.base == state and file.step > at:
            return file
    anchors = [file for file in usable if file.is_anchor and file.step > at and file.result != state]
    return anchors[-1] if anchors else None


def reached_step(files: Sequence[UpdateFile], state: str | None, step: int | None) -> int | None:
    """The step of the newest anchor if it has this state, which did not change or came back; else `step`.

    Arguments: see next_update.
    """
    anchors = [file for file in files if file.is_anchor]
    if step is None or not anchors or anchors[-1].result != state:
        return step
    return max(step, anchors[-1].step)


def other_chain(
    files: Sequence[UpdateFile], state: str | None, step: int | None, *, source: object, problems: Iterable[Path] = ()
) -> str | None:
    """The reason why no file of a source will ever continue a state: they are those of another chain, which is behind,
    or has another state at the same step.

    state, step: as in next_update. problems: files that cannot be read. None if there is no such reason.
    """
    if not files or state is None or step is None:
        return None
    unread = any(step_of(path.name) is not None for path in problems)
    if unread or any(file.result == state for file in files):
        return None
    if files[-1].step > step and all(file.step != step for file in files):
        return None  # the files before may have been deleted
    first, last = files[0], files[-1]
    named = f"{first.path.name} ({first.content_id})"
    named += "" if first is last else f" to {last.path.name} ({last.content_id})"
    return (
        f"{source}: has another chain, {named}; the model is at step {step} of the one with the result {state}; follow "
        "again from the beginning to take the new chain, or restore the old one"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The place of a state in its chain after a poll. lag: the number of updates ahead. other: see other_chain."""

    step: int | None
    lag: int
    other: str | None


def standing(
    files: Sequence[UpdateFile],
    state: str | None,
    step: int | None,
    waiting: dict[Path, str],
    *,
    source: str | Path,
    noticed: str | None,
) -> Standing:
    """Where a state stands after a poll. `waiting` gets the reasons why the files ahead, and the source, wait.

    state, step: as in next_update. noticed: `other` after the poll before; another chain is logged once.
    """
    step = reached_step(files, state, step)
    other = other_chain(files, state, step, source=source, problems=waiting)
    ahead = [file for file in files if not file.is_anchor and file.step > (-1 if step is None else step)]
    for file in ahead:
        waiting.setdefault(file.path, f"{file.path}: does not continue the model's state")
    if other is not None:
        waiting[Path(source)] = other
        if other != noticed:
            _LOGGER.error("%s", other)
    return Standing(step=step, lag=len(ahead), other=other)
