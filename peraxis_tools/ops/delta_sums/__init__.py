"""Signs of a delta and its weighted absolute sums in one pass over a matrix pair: interface and backends.

    d = f32(fine_tuned) - f32(base)          binary32
    mask      bit j of row i is 1 if d_ij >= 0
    row_i     = sum over j of |d_ij| w_j     binary64
    col_j     = sum over i of |d_ij|         binary64
    square    = sum over i, j of d_ij^2      binary64

The order of every sum is specified, so that threads and backends give the same bits: row_i and the square of a row are
summed in 8 lanes (column j in lane j mod 8, columns ascending), then the lanes are added from 0 to 7; col_j is summed
over chunks of 64 rows, rows ascending in a chunk, chunks ascending; squares are summed over rows ascending.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from peraxis_format import Array, DType
from peraxis_format.ops.backend import choose

__all__ = ["DeltaSums", "delta_sums"]


@dataclass(frozen=True, slots=True)
class DeltaSums:
    """mask: U8 [d_out, ceil(d_in/8)]. row: float64 [d_out]. col: float64 [d_in]. square: sum of squares."""

    mask: NDArray[np.uint8]
    row: NDArray[np.float64]
    col: NDArray[np.float64]
    square: float


def delta_sums(
    base: Array,
    fine_tuned: Array,
    *,
    base_dtype: DType,
    dtype: DType,
    weights: NDArray[np.float64] | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> DeltaSums:
    """The sums of one matrix pair (storage arrays [d_out, d_in] of float types).

    weights: w, float64 [d_in]; None for all ones. threads: at most this many, for numba. backend: numpy or numba.
    Raises BackendError.
    """
    chosen = import_module(f"peraxis_tools.ops.delta_sums.{choose('delta_sums', base.size, backend=backend)}")
    found = chosen.pair_sums(base, fine_tuned, base_dtype=base_dtype, dtype=dtype, weights=weights, threads=threads)
    return DeltaSums(*found)
