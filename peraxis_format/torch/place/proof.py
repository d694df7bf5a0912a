"""Check an exact tensor before it is written: it decodes on the live weights, and its result has the right digest.

A tensor is decoded one range at a time, so that it is not in memory twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from peraxis_format.delta import Encoding, ModuleDelta
from peraxis_format.dtypes import raw_bytes
from peraxis_format.errors import fail
from peraxis_format.manifest import ModuleEntry
from peraxis_format.ops.exact import BLOCK
from peraxis_format.ops.exact.torch import moved
from peraxis_format.ops.tensors import storage_array

__all__ = ["block_ranges", "proven", "stretches"]

_BLOCKS: Final = 16  # blocks to decode at a time: 2 MiB of BF16
_ON_DEVICE: Final = 16  # times as many on a device, which decodes all these blocks at once


def block_ranges(module: ModuleDelta, count: int = _BLOCKS) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Ranges of `count` blocks: the weights of the flat tensor, and the arguments of ops.exact.apply for them."""
    index, data, begin = module.index, module.data, 0
    if index is None or data is None:
        return
    for first in range(0, index.size, count):
        entries: NDArray[np.uint32] = index[first : first + count]
        size = int((entries >> np.uint32(8)).sum(dtype=np.int64))
        update = {"index": entries, "data": data[begin : begin + size], "dtype": module.dtype}
        yield slice(first * BLOCK, (first + count) * BLOCK), {**update, "field": module.name, "first": first}
        begin += size


def stretches(view: Tensor, module: ModuleDelta, *, done: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (live, new): the weights of a tensor, 2^20 at a time (on a GPU 2^24), and the updated weights.

    done: the number of ranges that are updated already, and are left out. live are views of a contiguous tensor, and
    copies of a strided one.
    Raises BindingError (E405) if the update does not decode on them.
    """
    flat = view.detach().reshape(-1)
    ranges = block_ranges(module, _BLOCKS * (_ON_DEVICE if view.is_cuda else 1))
    for weights, update in islice(ranges, done, None):
        live = flat[weights]
        yield live, moved(live, **update)


def proven(entry: ModuleEntry, view: Tensor, module: ModuleDelta) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield as `stretches`, and check the digest of the updated tensor, or of the base if the tensor is not decoded.

    Raises BindingError at the end (E404, E405).
    """
    if entry.encoding is not Encoding.EXACT:
        _check_base(entry, view)
        return
    digest = hashlib.sha256()
    for live, new in stretches(view, module):
        digest.update(raw_bytes(storage_array(new.cpu())))
        yield live, new
    if digest.hexdigest() != entry.result:
        fail("E405", field=entry.name)  # SPEC 7.4


def _check_base(entry: ModuleEntry, view: Tensor) -> None:
    if entry.base is None:
        return
    digest = hashlib.sha256()
    for begin in range(0, max(view.numel(), 1), _BLOCKS * BLOCK):
        digest.update(raw_bytes(storage_array(view.detach().reshape(-1)[begin : begin + _BLOCKS * BLOCK].cpu())))
    if digest.hexdigest() != entry.base.sha256:
        fail("E404", field=entry.name)  # SPEC 7.3
