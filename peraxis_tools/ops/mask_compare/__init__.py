"""Sums over the signs of two masks: the number of signs that differ, and the sum of their columns' weights.

    counts[i] = popcount(A_i xor B_i)
    sums[i]   = sum of w_j over the j with A_ij xor B_ij = 1;   sum_j w_j b^A_ij b^B_ij = sum_j w_j - 2 sums[i]

numba reads a mask as 64-bit words; the bits of a word select the weights that are added: four masked additions of 16
lanes with AVX-512, and LLVM's choice elsewhere. Weights are binary32, and so are the sums of 64 words in each lane (at
most 64 additions); these are then added in binary64. Only differing signs are summed, so the error, below 4e-6, is
relative to the difference. numpy, the reference, does one table lookup per byte: table[c, x] is the sum over those of
the eight columns of byte c whose bit in x is 1.

Rejected: tables in the compiled loop too (as fast on AVX2, 1.5 times slower on AVX-512, and they must be built for each
module); unpacking the signs for a matrix product, which moves 64 times the bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib import import_module
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from peraxis_format.ops.backend import choose

__all__ = ["Columns", "Counts", "Mask", "Sums", "differing"]

Mask: TypeAlias = NDArray[np.uint8]
Counts: TypeAlias = NDArray[np.int64]
Sums: TypeAlias = NDArray[np.float64]

_WORD_BITS: Final = 64
TABLE_WIDTH: Final = 1 << 13  # bytes of a row, of which each has 1 KiB in numpy's table; no real matrix is wider


class Columns:
    """The weights of a matrix's columns, prepared for `differing`.

    total: their sum, binary64. padded: binary32, whole words, 0 beyond d_in.
    """

    def __init__(self, weights: NDArray[np.float64]) -> None:
        self.total = float(weights.sum())
        self.padded = np.zeros(-(-weights.size // _WORD_BITS) * _WORD_BITS, np.float32)
        self.padded[: weights.size] = weights

    def tables(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """numpy's lookup tables [bytes, 256], each for a range of a row's bytes; a table has at most 8 MiB."""
        yield slice(0, TABLE_WIDTH), self._first
        for begin in range(TABLE_WIDTH, self.padded.size // 8, TABLE_WIDTH):
            yield slice(begin, begin + TABLE_WIDTH), self._table(begin)

    @functools.cached_property
    def _first(self) -> NDArray[np.float32]:
        return self._table(0)

    def _table(self, begin: int) -> NDArray[np.float32]:
        columns = self.padded.reshape(-1, 8)[begin : begin + TABLE_WIDTH]
        table = np.zeros((len(columns), 256), np.float32)
        for bit, column in enumerate(columns.T):
            # The entry of x with the highest bit `bit` is the entry without this bit, plus this bit's column.
            np.add(table[:, : 1 << bit], column[:, None], out=table[:, 1 << bit : 2 << bit])
        return table


def differing(a: Mask, b: Mask, columns: Columns | None, *, backend: str | None = None) -> tuple[Counts, Sums]:
    """Count the bits that differ in each row, and sum the weights of these columns (without weights: the counts).

    a, b: [rows, width], C-contiguous. backend: numpy or numba; counts are equal, and sums agree within the error above.
    Returns int64 [rows], binary64 [rows]. Raises BackendError.
    """
    chosen = import_module(f"peraxis_tools.ops.mask_compare.{choose('mask_compare', a.size, backend=backend)}")
    counts, sums = chosen.differing(a, b, columns)
    return counts, sums
