"""Name the update before one whose base does not match, because that one may be missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import peraxis_format as pxd

__all__ = ["predecessor_named"]


@contextlib.contextmanager
def predecessor_named(first: pxd.DeltaFile, *, given: bool = False) -> Iterator[None]:
    """Add the update that `first` follows to a BindingError, unless it was given."""
    try:
        yield
    except pxd.BindingError as error:
        if (before := first.manifest.previous) is not None and not given:
            hint = f"it follows update {before}: pass that one too, or its result as the base"
            error.detail = f"{error.detail}; {hint}" if error.detail else hint
        raise
