"""Decode an exact update on live tensors, one range at a time, so that it is checked before a weight is written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

from torch import Tensor

from peraxis_format.delta import ModuleDelta
from peraxis_format.dtypes import raw_bytes
from peraxis_format.errors import fail
from peraxis_format.manifest import ModuleEntry
from peraxis_format.ops.exact import BLOCK
from peraxis_format.ops.exact.torch import moved
from peraxis_format.ops.tensors import storage_array

__all__ = ["check_digest", "stretches"]

_STRETCH: Final = 16  # blocks to decode at a time
_ON_DEVICE: Final = 16  # times as many on a device, which decodes all these blocks at once


def stretches(view: Tensor, module: ModuleDelta) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (live, new): the weights of a contiguous tensor, 2^20 at a time (on a GPU 2^24), and the updated weights.

    Raises BindingError (E405) if the update does not decode on them.
    """
    index, data = module.index, module.data
    if index is None or data is None:
        return
    flat = view.detach().reshape(-1)
    begin = 0
    length = _STRETCH * (_ON_DEVICE if view.is_cuda else 1)
    for first in range(0, index.size, length):
        part = index[first : first + length]
        live = flat[first * BLOCK : (first + part.size) * BLOCK]
        size = int((part >> 8).sum(dtype="int64"))
        yield live, moved(live, part, data[begin : begin + size], module.dtype)
        begin += size


def check_digest(entry: ModuleEntry, view: Tensor) -> None:
    """Check that a contiguous tensor has the base's bytes. Raises BindingError (E404)."""
    digest = hashlib.sha256()
    for begin in range(0, max(view.numel(), 1), _STRETCH * BLOCK):
        digest.update(raw_bytes(storage_array(view.detach().reshape(-1)[begin : begin + _STRETCH * BLOCK].cpu())))
    if entry.base is not None and digest.hexdigest() != entry.base.sha256:
        fail("E404", field=entry.name)  # SPEC 7.3
