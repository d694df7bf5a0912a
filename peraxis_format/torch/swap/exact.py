"""Write an exact module of a host payload: the base's weights, then its blocks in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from peraxis_format.delta import ModuleDelta
from peraxis_format.dtypes import Array
from peraxis_format.ops.exact import BLOCK, apply

__all__ = ["block_ranges", "exact_jobs"]

_BLOCKS: Final = 16  # blocks to decode at a time: 2 MiB of BF16


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


def exact_jobs(module: ModuleDelta, base: Array, out: Array) -> Iterator[Callable[[], None]]:
    """Jobs that write the new weights to `out`. base: C-contiguous; it may be `out`.

    The caller has proved that the module decodes on this base.
    """
    if not out.flags.c_contiguous:
        yield partial(_strided, module, base, out)
        return
    flat, source = out.reshape(-1), base.reshape(-1)
    for weights, update in block_ranges(module):
        yield partial(_decode, source[weights], flat[weights], update)


def _decode(base: Array, out: Array, update: dict[str, Any]) -> None:
    np.copyto(out, base)
    apply(out, **update, threads=1)


def _strided(module: ModuleDelta, base: Array, out: Array) -> None:
    new = base.copy()
    for weights, update in block_ranges(module):
        apply(new.reshape(-1)[weights], **update, threads=1)
    np.copyto(out, new)
