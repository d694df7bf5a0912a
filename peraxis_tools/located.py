"""Name the file in an error of the format that only knows a tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import peraxis_format as pxd

__all__ = ["located"]


@contextlib.contextmanager
def located(path: Path) -> Iterator[None]:
    """Add the name of the file to a PxdError that passes through."""
    try:
        yield
    except pxd.PxdError as error:
        error.file = error.file or str(path)
        raise
