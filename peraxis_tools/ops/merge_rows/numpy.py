"""merge_rows in numpy, the reference. The arguments are those of numba.py, flat; outputs come last or first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["columns", "elect", "histogram", "keep_some"]

Block = NDArray[np.float32]
Vector = NDArray[np.float64]


def columns(block: Block, rows: Vector, out: Vector) -> None:
    """out [d_in] += sum over i of r_i |R_ij|."""
    out += np.add.reduce(rows[:, None] * np.abs(block), axis=0)


def elect(blocks: Block, weights: Vector, thresholds: Block, normalized: bool, out: Block) -> None:
    """blocks: [inputs, weights]. out: [weights], written."""
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
    out[:] = total


def keep_some(
    total: Vector, block: Block, chances: NDArray[np.uint32], weight: float, density: np.float32, limit: np.uint64
) -> None:
    """total += weight * (d / density) if the random number is below the limit."""
    kept = np.where(chances < limit, block / density, np.float32(0.0))
    total += weight * kept.astype(np.float64)


def histogram(bits: NDArray[np.uint32], high: int, counts: NDArray[np.int64]) -> None:
    """bits: uint32, bits of binary32; the sign is ignored. high: the upper half to count, -1 for all."""
    sizes = bits & np.uint32(0x7FFFFFFF)
    halves = sizes >> np.uint32(16)
    chosen = halves if high < 0 else sizes[halves == high] & np.uint32(0xFFFF)
    counts += np.bincount(chosen, minlength=len(counts))
