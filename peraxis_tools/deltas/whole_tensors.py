"""A .pxd that saves little because it stores many tensors whole."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import peraxis_format as pxd
from peraxis_tools.display.notes import note
from peraxis_tools.display.shown import counted

__all__ = ["SAVING_MIN", "full_bytes", "note_whole"]

SAVING_MIN: Final = 1.25  # the checkpoint's bytes divided by the file's, from which on a file saves enough


def full_bytes(manifest: pxd.Manifest) -> int:
    """The bytes of the tensors of the fine-tuned checkpoint."""
    return sum(module.dtype.size_of(module.shape) for module in manifest.modules)


def note_whole(path: Path, manifest: pxd.Manifest, *, size: int, reason: str) -> None:
    """Note a written file of `size` bytes that saves little, if tensors that are stored whole are most of it.

    reason: why they are whole, and what to do.
    """
    whole = [module for module in manifest.modules if module.encoding is pxd.Encoding.FULL]
    most = 2 * sum(module.dtype.size_of(module.shape) for module in whole) > size
    if most and full_bytes(manifest) < SAVING_MIN * size:
        tensors = counted(len(whole), "tensor")
        note(f"{path}: takes {size} of {full_bytes(manifest)} bytes, with {tensors} stored whole: {reason}")
