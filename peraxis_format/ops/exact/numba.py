"""Exact updates compiled with numba; blocks run in parallel on threads. The bits are those of numpy.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from peraxis_format.dtypes import Array
from peraxis_format.ops.exact.kinds import BLOCK, FloatKind, blocks_of
from peraxis_format.ops.exact.numba_decode import decode_blocks
from peraxis_format.ops.exact.numba_encode import encode_blocks
from peraxis_format.thread_pool import run_jobs

__all__ = ["apply", "encode"]

_BLOCKS: Final = 16  # blocks of a job: 2 MiB of BF16
_SLACK: Final = 16  # bytes on both sides of a job's data, which the decoder may read


def apply(
    weights: Array, index: NDArray[np.uint32], data: NDArray[np.uint8], kind: FloatKind, *, threads: int | None
) -> int | None:
    """Apply in place. weights: unsigned, 1-D. Returns the first malformed block, or None."""
    ends = np.cumsum(index >> np.uint32(8), dtype=np.int64)
    unsound: list[int] = []

    def job(first: int) -> Callable[[], None]:
        def run() -> None:
            part = index[first : first + _BLOCKS]
            begin, end = int(ends[first - 1]) if first else 0, int(ends[first + part.size - 1])
            padded = np.zeros(end - begin + 2 * _SLACK, np.uint8)
            padded[_SLACK : _SLACK + end - begin] = data[begin:end]
            here = weights[first * BLOCK : (first + part.size) * BLOCK]
            block = decode_blocks(here, _mutable(part), padded, kind.mantissa, kind.mask, BLOCK)
            if block >= 0:
                unsound.append(first + block)

        return run

    run_jobs((job(first) for first in _firsts(index)), threads=threads)
    return min(unsound, default=None)


def encode(
    old: Array, new: Array, kind: FloatKind, *, keyed: bool, threads: int | None
) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Index and data. old, new: unsigned, 1-D, C-contiguous."""
    index = np.zeros(blocks_of(old.size), np.uint32)
    parts: dict[int, NDArray[np.uint8]] = {}

    def job(first: int) -> Callable[[], None]:
        def run() -> None:
            here = slice(first * BLOCK, (first + _BLOCKS) * BLOCK)
            out = np.empty(old[here].nbytes, np.uint8)
            entries = index[first : first + _BLOCKS]
            size = encode_blocks(
                _mutable(old[here]), _mutable(new[here]), kind.mantissa, kind.mask, BLOCK, keyed, out, entries
            )
            parts[first] = out[:size].copy()

        return run

    run_jobs((job(first) for first in _firsts(index)), threads=threads)
    return index, np.concatenate([parts[first] for first in _firsts(index)])


def _mutable(array: Array) -> Array:
    """A writable array, because numba compiles a kernel again for a read-only one."""
    return array if array.flags.writeable else array.copy()


def _firsts(index: NDArray[np.uint32]) -> Iterator[int]:
    return iter(range(0, index.size, _BLOCKS))
