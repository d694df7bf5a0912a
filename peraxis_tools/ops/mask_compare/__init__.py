"""Sums over the signs of two masks: how many differ, and what a weighting of the columns adds up to.

    counts[i] = popcount(A_i xor B_i)
    sums[i]   = sum of w_j over the j where A_ij xor B_ij is 1;   sum_j w_j b^A_ij b^B_ij = sum_j w_j - 2 sums[i]

With numba a mask is read as 64-bit words, and the bits of a word say which of its 64 weights are added: with
AVX-512 four masked additions of 16 lanes, elsewhere what LLVM makes of them. Weights are binary32, and so are the
sums of 64 words in each lane (at most 64 additions); these are then added in binary64. Only what differs is summed,
so the error, below 4e-6, is relative to the difference. With numpy, the reference: one table lookup a byte, where
table[c, x] is what those of the eight columns of byte c add up to whose bits in x are 1.

Rejected: tables in the compiled loop too (as quick on AVX2, 1.5 times slower on AVX-512, and to be built for each
module); unpacking the signs for a matrix product, which moves 64 times the bytes.
"""

from __future__ import annotations

import functools
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


class Columns:
    """The weights of a matrix's columns, made ready for `differing`.

    total: their sum, binary64. padded: binary32, whole words, what is beyond d_in is 0.
    """

    def __init__(self, weights: NDArray[np.float64]) -> None:
        self.total = float(weights.sum())
        self.padded = np.zeros(-(-weights.size // _WORD_BITS) * _WORD_BITS, np.float32)
        self.padded[: weights.size] = weights

    @functools.cached_property
    def table(self) -> NDArray[np.float32]:
        """What numpy looks up: [bytes, 256]."""
        table = np.zeros((self.padded.size // 8, 256), np.float32)
        for bit, column in enumerate(self.padded.reshape(-1, 8).T):
            # Those x with the highest bit `bit` are those below it, plus this bit's column.
            np.add(table[:, : 1 << bit], column[:, None], out=table[:, 1 << bit : 2 << bit])
        return table


def differing(a: Mask, b: Mask, columns: Columns | None, *, backend: str | None = None) -> tuple[Counts, Sums]:
    """How many bits of each row differ, and what the weights of these columns add up to (the counts without weights).

    a, b: [rows, width], C-contiguous. backend: numpy or numba; they count alike, and sums agree within the error above.
    Returns int64 [rows], binary64 [rows]. Raises BackendError.
    """
    chosen = import_module(f"peraxis_tools.ops.mask_compare.{choose('mask_compare', a.size, backend=backend)}")
    counts, sums = chosen.differing(a, b, columns)
    return counts, sums
