"""The files of a folder that are updates, by their headers: step-<n>.pxd, and anchors, which are whole states
(anchor-<n>.pxd).

An update with another name is passed over. The reason is given, because such a file breaks the chain for its servers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from peraxis_format.chain_names import anchor_name, step_name, step_of
from peraxis_format.errors import PxdError
from peraxis_format.manifest import PART_KEY, Manifest
from peraxis_format.reader import DeltaFile

__all__ = [
    "AWAITED",
    "OtherFile",
    "UpdateFile",
    "list_updates",
    "listed",
    "misnamed_anchors",
    "missing_folder",
    "newer_file",
]

AWAITED: Final = "waiting for the first update"  # what a follower does about a missing folder


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

    @classmethod
    def of(
        cls, path: Path, manifest: Manifest, *, step: int, is_anchor: bool, stamp: tuple[int, int, int] = (0, 0, 0)
    ) -> UpdateFile:
        """The file of this manifest, which is that of an update."""
        return cls(
            path=path,
            step=step,
            is_anchor=is_anchor,
            content_id=manifest.content_id,
            previous=manifest.previous,
            base=manifest.base.digest,
            result=manifest.result or "",
            stamp=stamp,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherFile:
    """A file with the name of no step. result: None if it is not an update. The rest is as in UpdateFile."""

    path: Path
    content_id: str = ""
    previous: str | None = None
    base: str = ""
    result: str | None = None
    stamp: tuple[int, int, int] = (0, 0, 0)


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
    return f"{folder}: {reason}"


def list_updates(
    folder: Path, known: dict[Path, UpdateFile | OtherFile] | None = None, *, url: str | None = None
) -> tuple[list[UpdateFile], dict[Path, str]]:
    """The updates and anchors of a folder in the order of their steps, and the reasons why files are not among them:
    they cannot be read, or they have the name of no step or of another one. A folder that does not exist or cannot be
    read has a reason too.

    known: a cache of the files that were read; it is updated, so that a file is opened once, and again if it was
    replaced. url: the URL, if the folder has only the needed files of one.
    """
    files, others, problems = listed(folder, {} if known is None else known)
    if (reason := missing_folder(folder)) is not None:
        problems[folder] = f"{reason}; {AWAITED}"
    misnamed = misnamed_anchors(files)
    files = [file for file in files if file.path not in misnamed]
    reasons = ((other.path, _reason_for(other, files, url)) for other in others)
    return files, problems | misnamed | {path: reason for path, reason in reasons if reason is not None}


def listed(
    folder: Path, known: dict[Path, UpdateFile | OtherFile]
) -> tuple[list[UpdateFile], list[OtherFile], dict[Path, str]]:
    """The updates with the names of steps, other updates, and the faults of files with the names of steps."""
    problems: dict[Path, str] = {}
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


def misnamed_anchors(files: Sequence[UpdateFile]) -> dict[Path, str]:
    """The reasons why anchors are passed over: one that has the state of an update, but not of the last update up to
    its number.

    A server that took such an anchor would go back to an earlier state. The updates before an anchor, with its own, may
    have been deleted; then nothing can be said.
    """
    steps = {file.step: file for file in files if not file.is_anchor}
    reached = {file.result: file for file in steps.values()}
    misnamed: dict[Path, str] = {}
    for file in files:
        before = max((step for step in steps if step <= file.step), default=None)
        if not file.is_anchor or before is None or file.result not in reached:
            continue
        if steps[before].result == file.result:
            continue
        step = reached[file.result]
        name = anchor_name(step.step)
        taken = any(other.path.name == name for other in files)
        misnamed[file.path] = f"{file.path}: is passed over, because it has the state of {step.path.name}; " + (
            "move it away" if taken else f"rename it to {name}"
        )
    return misnamed


def _reason_for(other: OtherFile, files: Sequence[UpdateFile], url: str | None) -> str | None:
    """The reason why an update is passed over; None if steps lead to its result, like those that it folds, or if that
    is not known because they are at a URL alone.
    """
    before = [file for file in files if file.content_id == other.previous]
    before = before or [file for file in files if file.result == other.base]
    at = before[-1].step if before else None
    if any(file.result == other.result for file in files if at is None or file.step > at):
        return None
    if at is None and url is not None:
        return None
    told = f"{url or other.path.parent}/{other.path.name}: is passed over, because its name is not that of a step"
    if at is None:
        return f"{told}; rename it to step-<n>.pxd, by the step after the one that it follows"
    name = step_name(at + 1)
    if any(step_of(file.path.name) == (at + 1, False) for file in files):
        return f"{told}, and {name} follows the same state; move it away"
    return f"{told}; rename it to {name}, because it follows step {at}"


def _read(path: Path, stamp: tuple[int, int, int]) -> UpdateFile:
    place = step_of(path.name)
    with DeltaFile(path) as delta:
        manifest = delta.manifest
        if place is None or manifest.result is None:
            raise OSError(f"{path}: has no result, so it is not an update")
        if PART_KEY in manifest.metadata:  # SPEC 14
            raise OSError(f"{path}: is a part of an update; join the parts with `peraxis-tools merge`")
        return UpdateFile.of(path, manifest, step=place[0], is_anchor=place[1], stamp=stamp)


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
