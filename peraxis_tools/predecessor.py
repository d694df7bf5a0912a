"""Name the update before one whose base does not match, because that one may be missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import peraxis_format as pxd
from peraxis_format.errors import base_advice

__all__ = ["predecessor_named"]


@contextlib.contextmanager
def predecessor_named(first: pxd.DeltaFile, *, given: bool = False) -> Iterator[None]:
    """Make the remedy of a BindingError name the update that `first` follows, unless it was given, or else the base."""
    try:
        yield
    except pxd.BindingError as error:
        before = first.manifest.previous
        if before is None or given:
            error.advice = base_advice(first.manifest.base.id, first.manifest.base.revision)
        else:
            beside = _file_of(before, first.path.parent)
            named = "" if beside is None else f" ({beside})"
            error.advice = f"it follows update {before}{named}: pass that one too, or its result as the base"
        raise


def _file_of(content_id: str, folder: Path) -> Path | None:
    """The update with this content ID among the files of a folder; None if there is none."""
    for path in sorted(folder.glob("*.pxd")):
        with contextlib.suppress(pxd.PxdError, OSError), pxd.open(path) as file:
            if file.content_id == content_id:
                return path
    return None
