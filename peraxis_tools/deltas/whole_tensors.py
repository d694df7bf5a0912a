"""A .pxd that saves little because it stores many tensors whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final, Protocol

import peraxis_format as pxd
from peraxis_tools.display.notes import note
from peraxis_tools.display.shown import counted

__all__ = ["SAVING_MIN", "full_bytes", "note_whole"]

SAVING_MIN: Final = 1.25  # the checkpoint's bytes divided by the file's, from which on a file saves enough


class _SizedTensor(Protocol):
    @property
    def dtype(self) -> pxd.DType: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def full_bytes(modules: Iterable[_SizedTensor]) -> int:
    """The bytes of these modules in the fine-tuned checkpoint; tied tensors, which are one module, count once."""
    return sum(module.dtype.size_of(module.shape) for module in modules)


def note_whole(path: Path, manifest: pxd.Manifest, *, size: int, reason: str) -> None:
    """Note a written file of `size` bytes that saves little, if tensors that are stored whole are most of it.

    reason: why they are whole, and what to do.
    """
    whole = [module for module in manifest.modules if module.encoding is pxd.Encoding.FULL]
    full = full_bytes(manifest.modules)
    if 2 * full_bytes(whole) > size and full < SAVING_MIN * size:
        tensors = counted(len(whole), "tensor")
        note(f"{path}: takes {size} of {full} bytes, with {tensors} stored whole: {reason}")
