"""The updates of a folder by their headers: step-<n>.pxd, and anchors, which are whole states (anchor-<n>.pxd).

An update with another name is passed over. The reason is given, because such a file breaks the chain for its servers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from peraxis_format.chain_names import step_name, step_of
from peraxis_format.errors import LiveModelError, PxdError
from peraxis_format.manifest import PART_KEY
from peraxis_format.reader import DeltaFile

__all__ = [
    "AWAITED",
    "OtherFile",
    "Standing",
    "UpdateFile",
    "Way",
    "chain_of",
    "list_updates",
    "missing_folder",
    "newer_file",
    "next_update",
    "other_chain",
    "reached_step",
    "standing",
]

_LOGGER: Final = logging.getLogger("peraxis")
AWAITED: Final = "waiting for the first update"  # what a follower does about a missing folder
_NAMES: Final = 3  # files that an error names at most


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateFile:
    """One file of a chain. base, result: digests over all tensors before and after (SPEC 3.11, 3.14).

    An anchor needs no state before it. stamp: inode, size and time of change of the file that was read.
    """

    path: Path
    step: int
    is_anchor: bool
    content_id: str
    previous: str | None
    base: str
    result: str
    stamp: tuple[int, int, int] = (0, 0, 0)


def newer_file(path: Path) -> Path | None:
    """A file of the same folder with a higher step than that of this one. Raises OSError if there is no such folder."""
    own = step_of(path.name)
    for other in path.parent.iterdir():
        step = step_of(other.name)
        if own is not None and step is not None and step[0] > own[0]:
            return other
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherFile:
    """A file with the name of no step. result: None if it is not an update. The rest is as in UpdateFile."""

    path: Path
    content_id: str = ""
    previous: str | None = None
    base: str = ""
    result: str | None = None
    stamp: tuple[int, int, int] = (0, 0, 0)


def missing_folder(folder: Path) -> str | None:
    """The reason why a folder of updates has none, if it does not exist or cannot be read; that may change later."""
    try:
        with os.scandir(folder):
            return None
    except FileNotFoundError:
        reason = "no such folder yet"
    except NotADirectoryError:
        reason = "is not a folder"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    return f"{folder}: {reason}"


def list_updates(
    folder: Path, known: dict[Path, UpdateFile | OtherFile] | None = None
) -> tuple[list[UpdateFile], dict[Path, str]]:
    """The updates and anchors of a folder in the order of their steps, and the reasons why files are not among them:
    they cannot be read, or they are updates with the name of no step. A folder that does not exist or cannot be read
    has a reason too.

    known: a cache of the files that were read; it is updated, so that a file is opened once, and again if it was
    replaced.
    """
    files, others, problems = _listed(folder, {} if known is None else known)
    reasons = ((other.path, _reason_for(other, files)) for other in others)
    return files, problems | {path: reason for path, reason in reasons if reason is not None}


def _listed(
    folder: Path, known: dict[Path, UpdateFile | OtherFile]
) -> tuple[list[UpdateFile], list[OtherFile], dict[Path, str]]:
    """The updates with the names of steps, other updates, and the faults of files with the names of steps."""
    problems: dict[Path, str] = {}
    if (reason := missing_folder(folder)) is not None:
        problems[folder] = f"{reason}; {AWAITED}"
    present = set(folder.glob("*.pxd"))
    for gone in known.keys() - present:
        del known[gone]
    for path in sorted(present):
        try:
            about = path.stat()
            stamp = (about.st_ino, about.st_size, about.st_mtime_ns)
            if path not in known or known[path].stamp != stamp:
                known[path] = _read(path, stamp) if step_of(path.name) else _read_other(path, stamp)
        except (PxdError, OSError) as error:
            known.pop(path, None)
            if step_of(path.name):
                problems[path] = str(error)
    files = [file for file in known.values() if isinstance(file, UpdateFile)]
    others = [file for file in known.values() if isinstance(file, OtherFile) and file.result is not None]
    return (
        sorted(files, key=lambda file: (file.step, file.is_anchor)),
        sorted(others, key=lambda file: file.path),
        problems,
    )


def _reason_for(other: OtherFile, files: Sequence[UpdateFile]) -> str | None:
    """The reason why an update is passed over; None if steps lead to its result, like those that it folds."""
    before = [file for file in files if file.content_id == other.previous]
    before = before or [file for file in files if file.result == other.base]
    at = before[-1].step if before else None
    if any(file.result == other.result for file in files if at is None or file.step > at):
        return None
    told = f"{other.path}: is passed over, because its name is not that of a step"
    if at is None:
        return f"{told}; rename it to step-<n>.pxd, by the step after the one that it follows"
    name = step_name(at + 1)
    if any(step_of(file.path.name) == (at + 1, False) for file in files):
        return f"{told}, and {name} follows the same state; move it away"
    return f"{told}; rename it to {name}, because it follows step {at}"


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
    files, others, problems = _listed(folder, {})
    if problems:
        raise LiveModelError(f"{next(iter(problems.values()))}; move it away and publish again")
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
    """The reason why no file of a source will ever continue a state: they are those of another chain, which is behind.

    state, step: as in next_update. problems: files that cannot be read. None if there is no such reason.
    """
    if not files or state is None or step is None:
        return None
    unread = any(step_of(path.name) is not None for path in problems)
    if unread or files[-1].step > step or any(file.result == state for file in files):
        return None
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
    ahead = [file for file in files if not file.is_anchor and file.step > (-1 if step is None else step)]
    for file in ahead:
        waiting.setdefault(file.path, f"{file.path}: does not continue the model's state")
    other = other_chain(files, state, step, source=source, problems=waiting)
    if other is not None:
        waiting[Path(source)] = other
        if other != noticed:
            _LOGGER.error("%s", other)
    return Standing(step=step, lag=len(ahead), other=other)


def _read(path: Path, stamp: tuple[int, int, int]) -> UpdateFile:
    place = step_of(path.name)
    with DeltaFile(path) as delta:
        manifest = delta.manifest
        if place is None or manifest.result is None:
            raise OSError(f"{path}: has no result, so it is not an update")
        if PART_KEY in manifest.metadata:  # SPEC 14
            raise OSError(f"{path}: is a part of an update; join the parts with `peraxis-tools merge`")
        return UpdateFile(
            path=path,
            step=place[0],
            is_anchor=place[1],
            content_id=delta.content_id,
            previous=manifest.previous,
            base=manifest.base.digest,
            result=manifest.result,
            stamp=stamp,
        )


def _read_other(path: Path, stamp: tuple[int, int, int]) -> OtherFile:
    """A file with the name of no step. One that cannot be read is no update, until it is replaced."""
    try:
        with DeltaFile(path) as delta:
            manifest = delta.manifest
    except PxdError:
        return OtherFile(path=path, stamp=stamp)
    if PART_KEY in manifest.metadata:  # SPEC 14
        return OtherFile(path=path, stamp=stamp)
    return OtherFile(
        path=path,
        content_id=delta.content_id,
        previous=manifest.previous,
        base=manifest.base.digest,
        result=manifest.result,
        stamp=stamp,
    )
