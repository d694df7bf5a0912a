"""A delta that can be read again, whatever becomes of its name.

Only the open descriptor is kept: a parsed header takes a third of a megabyte, for each of many variants.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from peraxis_format.engines.vllm.bridge import descriptor_of
from peraxis_format.errors import LiveModelError, PxdError
from peraxis_format.reader import DeltaFile

__all__ = ["KeptFile"]


class KeptFile:
    """The open file of a delta. path: for errors; it may be renamed or removed meanwhile."""

    def __init__(self, file: DeltaFile) -> None:
        self.path = file.path
        self.content_id = file.content_id
        self._descriptor = descriptor_of(file)
        self._closing = weakref.finalize(self, os.close, self._descriptor)

    def read(self) -> DeltaFile:
        """Open the same file once more. Raises LiveModelError if another one was written in its place; PxdError,
        OSError.
        """
        try:
            file = DeltaFile(Path(f"/dev/fd/{self._descriptor}"))
        except PxdError as error:
            error.file = str(self.path)
            raise
        file.path = self.path
        if file.content_id != self.content_id:
            file.close()
            raise LiveModelError(f"{self.path}: was overwritten by another file; load it again")
        return file

    def close(self) -> None:
        """Close the file."""
        self._closing()
