"""The updates of a folder by their headers: step-<n>.pxd, and anchors, which are whole states (anchor-<n>.pxd)."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from peraxis_format.errors import LiveModelError, PxdError
from peraxis_format.reader import DeltaFile

__all__ = [
    "Standing",
    "UpdateFile",
    "Way",
    "anchor_name",
    "chain_of",
    "list_updates",
    "missing_folder",
    "newer_file",
    "next_update",
    "other_chain",
    "reached_step",
    "standing",
    "step_name",
    "step_of",
]

_LOGGER: Final = logging.getLogger("peraxis")
_NAME: Final = re.compile(r"(step|anchor)-([0-9]{1,18})\.pxd")


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


def step_name(step: int) -> str:
    """The file name of an update; names sort by their steps."""
    return f"step-{step:08d}.pxd"


def anchor_name(step: int) -> str:
    """The file name of an anchor."""
    return f"anchor-{step:08d}.pxd"


def step_of(name: str) -> tuple[int, bool] | None:
    """The step of a file name, and whether it is an anchor; None for any other file."""
    match = _NAME.fullmatch(name)
    return None if match is None else (int(match[2]), match[1] == "anchor")


def newer_file(path: Path) -> Path | None:
    """A file of the same folder with a higher step than that of this one. Raises OSError if there is no such folder."""
    own = step_of(path.name)
    for other in path.parent.iterdir():
        step = step_of(other.name)
        if own is not None and step is not None and step[0] > own[0]:
            return other
    return None


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
    return f"{folder}: {reason}; waiting for the first update"


def list_updates(folder: Path, known: dict[Path, UpdateFile] | None = None) -> tuple[list[UpdateFile], dict[Path, str]]:
    """The updates and anchors of a folder in the order of their steps, and the faults of files that cannot be read.
    A folder that does not exist or cannot be read is one of the faults.

    known: a cache of the files that were read; it is updated, so that a file is opened once, and again if it was
    replaced.
    """
    known = {} if known is None else known
    problems: dict[Path, str] = {}
    if (reason := missing_folder(folder)) is not None:
        problems[folder] = reason
    present = {path for path in folder.glob("*.pxd") if _NAME.fullmatch(path.name)}
    for gone in known.keys() - present:
        del known[gone]
    for path in sorted(present):
        try:
            about = path.stat()
            stamp = (about.st_ino, about.st_size, about.st_mtime_ns)
            if path not in known or known[path].stamp != stamp:
                known[path] = _read(path, stamp)
        except (PxdError, OSError) as error:
            known.pop(path, None)
            problems[path] = str(error)
    return sorted(known.values(), key=lambda file: (file.step, file.is_anchor)), problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """The way from the newest anchor of a folder to its last state. head: the predecessor of the next update."""

    anchor: UpdateFile
    updates: tuple[UpdateFile, ...]
    head: UpdateFile


def chain_of(folder: Path) -> Way | None:
    """The way to the last state of a folder that a trainer continues; None if the folder has no chain.

    Raises LiveModelError for a file that cannot be read, a gap, and updates without an anchor.
    """
    files, problems = list_updates(folder)
    if folder in problems:
        raise LiveModelError(problems[folder].partition(";")[0])
    if problems:
        raise LiveModelError(f"{next(iter(problems.values()))}; move it away and publish again")
    anchors = [file for file in files if file.is_anchor]
    if not files:
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
    if left:
        raise LiveModelError(f"{left[0].path}: a gap; no file leads to its base state")
    return Way(anchor=anchors[-1], updates=tuple(updates), head=head)


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
    match = _NAME.fullmatch(path.name)
    with DeltaFile(path) as delta:
        manifest = delta.manifest
        if match is None or manifest.result is None:
            raise OSError(f"{path}: has no result, so it is not an update")
        if "peraxis.part" in manifest.metadata:  # SPEC 14
            raise OSError(f"{path}: is a part of an update; join the parts with `peraxis-tools merge`")
        return UpdateFile(
            path=path,
            step=int(match[2]),
            is_anchor=match[1] == "anchor",
            content_id=delta.content_id,
            previous=manifest.previous,
            base=manifest.base.digest,
            result=manifest.result,
            stamp=stamp,
        )
