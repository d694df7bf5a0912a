"""delta_sums in numpy, the reference."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from peraxis_format import Array, DType, pack_signs, to_float32

__all__ = ["pair_sums"]

_LANES: Final = 8
_CHUNK: Final = 64


def pair_sums(
    base: Array,
    fine_tuned: Array,
    *,
    base_dtype: DType,
    dtype: DType,
    weights: NDArray[np.float64] | None = None,
    threads: int | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64], float]:
    """(mask, row, col, sum of d^2), in the specified order. threads: not used."""
    width = base.shape[1]
    lanes_w = np.zeros(-(-width // _LANES) * _LANES)
    lanes_w[:width] = 1.0 if weights is None else weights
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
    col = cols[0].copy()
    for chunk in cols[1:]:
        col += chunk
    return np.concatenate(masks), np.concatenate(rows), col, float(np.cumsum(np.concatenate(squares))[-1])


def _lane_sums(wide: NDArray[np.float64]) -> NDArray[np.float64]:
    """[rows, 8 n] -> [rows], in the specified order."""
    lanes = np.ascontiguousarray(wide.reshape(len(wide), -1, _LANES).transpose(1, 0, 2))
    summed: NDArray[np.float64] = np.add.reduce(lanes, axis=0)
    total: NDArray[np.float64] = summed[:, 0].copy()
    for lane in range(1, _LANES):
        total += summed[:, lane]
    return total
