"""Open a PXD file for reading: a regular file, which a URL is not."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Final

from peraxis_format.errors import fail

__all__ = ["open_regular"]

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]+:/")  # a Path keeps one of the two slashes


def open_regular(path: Path) -> int:
    """A descriptor of the file. Raises ContainerError (E101) for a folder, a pipe or a device; OSError."""
    # SPEC 2.1: check before opening, because opening a pipe would wait for a writer.
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if _URL.match(str(path)) is None:
            raise
        reason = "is a URL and not a file; fetch it first (peraxis.pull)"
        raise FileNotFoundError(errno.ENOENT, reason, str(path)) from None
    if not stat.S_ISREG(mode):
        fail("E101", "it is a folder" if stat.S_ISDIR(mode) else "")
    return os.open(path, os.O_RDONLY)
