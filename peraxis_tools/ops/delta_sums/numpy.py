"""One pass over a matrix pair: signs of the delta and its weighted absolute sums, the same bits with and without numba.

    d = f32(fine_tuned) - f32(base)          binary32
    mask      bit j of row i is 1 where d_ij >= 0
    row_i     = sum over j of |d_ij| w_j     binary64
    col_j     = sum over i of |d_ij|         binary64
    square    = sum over i, j of d_ij^2      binary64

The order of every sum is part of the contract, so that neither threads nor the fallback change a byte: row_i and the
square of a row are summed in 8 lanes (column j in lane j mod 8, columns ascending), lanes then added from 0 to 7;
col_j is summed over chunks of 64 rows, rows ascending in a chunk, chunks ascending; squares over rows ascending.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from peraxis_format import Array, DType, pack_signs, to_float32

__all__ = ["DeltaSums", "have_numba", "have_triton", "matrix_sums"]

_LANES: Final = 8
_CHUNK: Final = 64


@dataclass(frozen=True, slots=True)
class DeltaSums:
    """mask: U8 [d_out, ceil(d_in/8)]. row: float64 [d_out]. col: float64 [d_in]. square: sum of squares."""

    mask: NDArray[np.uint8]
    row: NDArray[np.float64]
    col: NDArray[np.float64]
    square: float


def matrix_sums(
    base: Array,
    fine_tuned: Array,
    *,
    base_dtype: DType,
    dtype: DType,
    weights: NDArray[np.float64] | None = None,
    numba: bool | None = None,
) -> DeltaSums:
    """The sums of one matrix pair (storage arrays [d_out, d_in]).

    weights: w, all ones where None. numba: force or forbid the compiled kernel.
    """
    width = base.shape[1]
    w = np.ones(width) if weights is None else np.ascontiguousarray(weights)
    if have_numba() if numba is None else numba:
        return _compiled_sums(base, fine_tuned, base_dtype, dtype, w)
    lanes_w = np.zeros(-(-width // _LANES) * _LANES)
    lanes_w[:width] = w
    masks, rows, cols, squares = [], [], [], []
    for start in range(0, base.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        delta = to_float32(fine_tuned[part], dtype) - to_float32(base[part], base_dtype)
        masks.append(pack_signs(delta >= 0))
        wide = np.zeros((len(delta), len(lanes_w)))
        np.abs(delta, out=wide[:, :width])
        cols.append(np.add.reduce(wide[:, :width], axis=0))
        rows.append(_lane_sums(wide * lanes_w))
        squares.append(_lane_sums(wide * wide))
    return _collect(np.concatenate(masks), np.concatenate(rows), np.stack(cols), np.concatenate(squares))


def _lane_sums(wide: NDArray[np.float64]) -> NDArray[np.float64]:
    """[rows, 8 n] -> [rows], in the order that the module states."""
    lanes = np.ascontiguousarray(wide.reshape(len(wide), -1, _LANES).transpose(1, 0, 2))
    summed = np.add.reduce(lanes, axis=0)
    total = summed[:, 0].copy()
    for lane in range(1, _LANES):
        total += summed[:, lane]
    return total


def _collect(
    mask: NDArray[np.uint8],
    row: NDArray[np.float64],
    chunks: NDArray[np.float64],
    squares: NDArray[np.float64],
) -> DeltaSums:
    col = chunks[0].copy()
    for chunk in chunks[1:]:
        col += chunk
    return DeltaSums(mask=mask, row=row, col=col, square=float(np.cumsum(squares)[-1]))


@cache
def have_numba() -> bool:
    """Whether numba can be imported."""
    try:
        import numba
    except ImportError:
        return False
    return bool(numba.__version__)


@cache
def have_triton() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.__version__)


def _compiled_sums(
    base: Array, fine_tuned: Array, base_dtype: DType, dtype: DType, weights: NDArray[np.float64]
) -> DeltaSums:
    from peraxis_format.ops.rebuild.numba import pair_sums

    mask, row, col, square = pair_sums(base, fine_tuned, base_dtype=base_dtype, dtype=dtype, weights=weights)
    return DeltaSums(mask=mask, row=row, col=col, square=square)
