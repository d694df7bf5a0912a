"""UpdateError, and the check that a file is an exact update."""

from __future__ import annotations

from peraxis_format.delta import Encoding
from peraxis_format.errors import LiveModelError
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.place.shards import Placement

__all__ = ["UpdateError", "refuse_others"]


class UpdateError(LiveModelError):
    """An update does not continue the model's state; the message names it and the reason."""


def refuse_others(file: DeltaFile, placement: Placement) -> None:
    """Raise UpdateError unless this is an exact update, or an anchor, of contiguous tensors."""
    for entry in file.manifest.modules:
        if entry.encoding is Encoding.SIGN or (entry.base is not None and entry.base.dtype is not entry.dtype):
            raise UpdateError(f"{file.path}: {entry.name} is not an exact update; use it as a variant")
        if not all(part.view.is_contiguous() for part in placement[entry.name]):
            raise UpdateError(f"{entry.name}: is strided, which exact updates do not support; make it contiguous")
