"""Remedies for an update on another base: which update fails, and which one is missing before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import peraxis_format as pxd
from peraxis_format.errors import base_advice, previous_advice
from peraxis_tools.display.shown import listed

__all__ = ["advise", "predecessor_named"]

_SHOWN: Final = 3
# The base of an exact tensor is checked before its result.
_WRONG_RESULT: Final = (
    "fetch this update again; if the publisher's copy has this content ID, the publisher must write it again"
)


@contextlib.contextmanager
def predecessor_named(*files: pxd.DeltaFile, several: bool = True) -> Iterator[None]:
    """Give a BindingError the remedy for the file that has it. files: a chain, in order; those before it are given.

    several: whether the verb takes several updates.
    """
    try:
        yield
    except pxd.BindingError as error:
        at = next((i for i, file in enumerate(files) if error.file == str(file.path)), 0)
        advise(error, files[at], given=files[at - 1].path if at else None, several=several)
        raise


def advise(error: pxd.PxdError, file: pxd.DeltaFile, *, given: Path | None = None, several: bool = True) -> None:
    """Set the remedy of an error of an update, if it is a BindingError.

    given: the update before it, if it is known. several: whether the verb takes several updates.
    """
    if not isinstance(error, pxd.BindingError):
        return
    previous = file.manifest.previous
    if error.code == "E405":
        error.advice = _WRONG_RESULT
    elif given is not None:
        error.advice = f"it was not made on the result of {given}: write it again with `update --after`"
    elif previous is None:
        error.advice = base_advice(file.manifest.base.id, file.manifest.base.revision)
    else:
        error.advice = previous_advice(previous, _named(previous, file.path.parent), several=several)


def _named(content_id: str, folder: Path) -> str:
    """The file with this content ID in a folder, in parentheses, or else those that cannot be read."""
    unreadable: list[str] = []
    for path in sorted(folder.glob("*.pxd")):
        try:
            with pxd.open(path) as file:
                if file.content_id == content_id:
                    return f" ({path})"
        except (pxd.PxdError, OSError):
            unreadable.append(str(path))
    if not unreadable:
        return ""
    return f" (perhaps {'one of ' if len(unreadable) > 1 else ''}{listed(unreadable, _SHOWN)}, which cannot be read)"
