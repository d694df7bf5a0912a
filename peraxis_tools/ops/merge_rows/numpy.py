"""What a merge does to each weight, on float32 blocks of rows; compiled by numba where it can be, to the same bits.

columns      c_j = sum over i of r_i |R_ij|                     binary64, rows ascending
elect        sum of w_k d_k over those k with the sign of the whole sum, divided by their w_k if normalised
keep_some    total += w d / p where the chance is below p
histogram    how many |d| have this upper half of their 16 + 16 bits, or this one and each lower half
row_sums     signs of R, sum over j of |R_ij| w_j, and the sum of squares: `matrix_sums` on one thread
"""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from types import ModuleType
from typing import Final

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_tools.ops.delta_sums.numpy import matrix_sums

__all__ = ["HALF", "add_terms", "columns", "elect", "histogram", "keep_some", "row_sums"]

Block = NDArray[np.float32]
Vector = NDArray[np.float64]

HALF: Final = 1 << 16
_COMPILED_FROM: Final = 1 << 16  # weights; below, numpy is done before numba is imported


@functools.cache
def _loops() -> ModuleType | None:
    try:
        import_module("numba")
    except ImportError:
        return None
    return import_module("peraxis_tools.ops.merge_rows.numba") if sys.byteorder == "little" else None


def _compiled(block: NDArray[np.generic]) -> ModuleType | None:
    """The compiled loops, where there are some and a block of this size is worth their import."""
    return _loops() if block.size >= _COMPILED_FROM else None


def add_terms(
    out: Block, masks: list[NDArray[np.uint8]], scales: Block, weights: Block, *, threads: int | None = 1
) -> None:
    """out += sum over k of sign_k * (scale_k * weight_k), each addition in binary32, k ascending.

    out: [rows, d_in]. masks: [rows, ceil(d_in/8)] each. scales: [k, rows]. weights: [k, d_in], of the columns.
    threads: None for one a processor.
    """
    if _compiled(out) is not None:
        from peraxis_format.ops.rebuild import numba as fast

        fast.rebuild_matrix(masks, scales, weights, out, out, dtype=pxd.DType.F32, threads=threads)
        return
    for mask, scale, weight in zip(masks, scales, weights, strict=True):
        size = scale[:, None] * weight
        out += np.where(pxd.unpack_signs(mask, out.shape[1]), size, -size)


def row_sums(block: Block, zeros: Block, weights: Vector | None) -> tuple[NDArray[np.uint8], Vector, float]:
    """Signs (>= 0), sum over j of |R_ij| w_j, and the sum of squares. zeros: of the block's shape."""
    if _compiled(block) is None:
        found = matrix_sums(zeros, block, base_dtype=pxd.DType.F32, dtype=pxd.DType.F32, weights=weights, numba=False)
        return found.mask, found.row, found.square
    from peraxis_format.ops.rebuild import numba as fast

    mask, row, _, square = fast.pair_sums(
        zeros, block, base_dtype=pxd.DType.F32, dtype=pxd.DType.F32, weights=weights, threads=1
    )
    return mask, row, square


def columns(block: Block, rows: Vector) -> Vector:
    """sum over i of r_i |R_ij|: binary64 [d_in]."""
    compiled = _compiled(block)
    if compiled is None:
        return np.add.reduce(rows[:, None] * np.abs(block), axis=0)
    out = np.zeros(block.shape[1])
    compiled.columns(block, rows, out)
    return out


def elect(blocks: list[Block], weights: Vector, thresholds: Block, *, normalized: bool) -> Block:
    """What `ties` leaves of deltas of one shape: those below their threshold are 0, and the sign of the sum decides."""
    compiled = _compiled(blocks[0])
    if compiled is None:
        return _elect(blocks, weights, thresholds, normalized=normalized)
    out = np.empty(blocks[0].shape, np.float32)
    stacked = np.stack([np.ascontiguousarray(block).reshape(-1) for block in blocks])
    compiled.elect(stacked, weights, thresholds, normalized, out.reshape(-1))
    return out


def _elect(blocks: list[Block], weights: Vector, thresholds: Block, *, normalized: bool) -> Block:
    trimmed = [np.where(np.abs(d) >= t, d, np.float32(0.0)) for d, t in zip(blocks, thresholds, strict=True)]
    parts = [weight * block.astype(np.float64) for block, weight in zip(trimmed, weights, strict=True)]
    positive = np.sum(parts, axis=0) >= 0.0
    total = np.zeros(positive.shape)
    divisor = np.zeros(positive.shape)
    for part, weight in zip(parts, weights, strict=True):
        agrees = ((part > 0.0) == positive) & (part != 0.0)
        total += np.where(agrees, part, 0.0)
        divisor += np.where(agrees, weight, 0.0)
    if normalized:
        total /= np.where(np.abs(divisor) > 1e-8, divisor, 1.0)
    return total.astype(np.float32)


def keep_some(total: Vector, block: Block, chances: NDArray[np.uint32], weight: float, density: float) -> None:
    """total += weight * (d / p) where its chance, of 2^32, is below p = density. total: binary64, like the block."""
    limit, scaled = np.uint64(round(density * 2**32)), np.float32(density)
    compiled = _compiled(block)
    if compiled is not None:
        compiled.keep_some(
            total.reshape(-1), np.ascontiguousarray(block).reshape(-1), chances.reshape(-1), weight, scaled, limit
        )
        return
    kept = np.where(chances.reshape(block.shape) < limit, block / scaled, np.float32(0.0))
    total += weight * kept.astype(np.float64)


def histogram(block: Block, high: int | None, counts: NDArray[np.int64]) -> None:
    """Count magnitudes by the upper half of their bits, or those of this upper half by the lower; adds to counts."""
    compiled = _compiled(block)
    if compiled is not None:
        compiled.histogram(
            np.ascontiguousarray(block).reshape(-1).view(np.uint32), -1 if high is None else high, counts
        )
        return
    bits = np.abs(block).reshape(-1).view(np.uint32)
    halves = bits >> np.uint32(16)
    chosen = halves if high is None else bits[halves == high] & np.uint32(HALF - 1)
    counts += np.bincount(chosen, minlength=HALF)
