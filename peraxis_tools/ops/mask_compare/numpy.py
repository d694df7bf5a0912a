"""Sums over the signs of two masks: how many differ, and what a weighting of the columns adds up to.

    counts[i] = popcount(A_i xor B_i)
    sums[i]   = sum of w_j over the j where A_ij xor B_ij is 1;   sum_j w_j b^A_ij b^B_ij = sum_j w_j - 2 sums[i]

Compiled (numba), a mask is read as 64-bit words, and the bits of a word say which of its 64 weights are added: with
AVX-512 four masked additions of 16 lanes, elsewhere what LLVM makes of them. Weights are binary32, and so are the
sums of 64 words in each lane (at most 64 additions); these are then added in binary64. Only what differs is summed,
so the error, below 4e-6, is relative to the difference. Without numba: one table lookup a byte, where table[c, x] is
what those of the eight columns of byte c add up to whose bits in x are 1.

Rejected: tables in the compiled loop too (as quick on AVX2, 1.5 times slower on AVX-512, and to be built for each
module); unpacking the signs for a matrix product, which moves 64 times the bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Columns", "differing"]

Mask: TypeAlias = NDArray[np.uint8]
Counts: TypeAlias = NDArray[np.int64]
Sums: TypeAlias = NDArray[np.float64]

_BYTE_COUNT: Final = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1).astype(np.uint8)
_NUMPY_BLOCK: Final = 1 << 20
_COMPILED_FROM: Final = 1 << 16  # bytes of a mask; below, numpy is done before numba is imported


class Columns:
    """The weights of a matrix's columns, made ready for `differing`.

    total: their sum, binary64. padded: binary32, whole words, what is beyond d_in is 0.
    """

    def __init__(self, weights: NDArray[np.float64]) -> None:
        self.total = float(weights.sum())
        self.padded = np.zeros(-(-weights.size // 64) * 64, np.float32)
        self.padded[: weights.size] = weights

    @functools.cached_property
    def table(self) -> NDArray[np.float32]:
        """What numpy looks up: [bytes, 256]."""
        table = np.zeros((self.padded.size // 8, 256), np.float32)
        for bit, column in enumerate(self.padded.reshape(-1, 8).T):
            # Those x with the highest bit `bit` are those below it, plus this bit's column.
            np.add(table[:, : 1 << bit], column[:, None], out=table[:, 1 << bit : 2 << bit])
        return table


def differing(a: Mask, b: Mask, columns: Columns | None) -> tuple[Counts, Sums]:
    """How many bits of each row differ, and what the weights of these columns add up to (the counts without weights).

    a, b: [rows, width], C-contiguous. Returns int64 [rows], binary64 [rows].
    """
    compiled = _compiled() if a.size >= _COMPILED_FROM else None
    if compiled is None:
        return _differing_numpy(a, b, columns)
    counts, sums = np.empty(a.shape[0], np.int64), np.empty(a.shape[0])
    left, right = _words(a), _words(b)
    if columns is None:
        compiled.count(left, right, counts)
        return counts, counts.astype(np.float64)
    compiled.add(left, right, columns.padded, counts, sums)
    return counts, sums


def _differing_numpy(a: Mask, b: Mask, columns: Columns | None) -> tuple[Counts, Sums]:
    count = getattr(np, "bitwise_count", _BYTE_COUNT.__getitem__)  # numpy 2
    step = max(1, _NUMPY_BLOCK // a.shape[1])
    blocks = [a[i : i + step] ^ b[i : i + step] for i in range(0, a.shape[0], step)]
    counts = np.concatenate([count(block).sum(axis=1, dtype=np.int64) for block in blocks])
    if columns is None:
        return counts, counts.astype(np.float64)
    table, places = columns.table, np.arange(a.shape[1])
    return counts, np.concatenate([table[places, block].sum(axis=1, dtype=np.float64) for block in blocks])


def _words(mask: Mask) -> NDArray[np.uint64]:
    """A mask as 64-bit words, each row filled up with zeros; a view where that is possible."""
    rows, width = mask.shape
    if width % 8 or mask.ctypes.data % 8:
        padded = np.zeros((rows, width + -width % 8), np.uint8)
        padded[:, :width] = mask
        mask = padded
    return np.ascontiguousarray(mask).view(np.uint64)


class _Kernels:
    """The compiled loops; they hold no lock. count(a, b, counts); add(a, b, weights, counts, sums)."""

    def __init__(self, count: Callable[..., None], add: Callable[..., None]) -> None:
        self.count = count
        self.add = add


@functools.cache
def _compiled() -> _Kernels | None:
    try:
        import_module("numba")
    except ImportError:
        return None
    kernels = import_module("peraxis_tools.ops.mask_compare.numba")
    return _Kernels(kernels.count_loop, kernels.add_loop)
