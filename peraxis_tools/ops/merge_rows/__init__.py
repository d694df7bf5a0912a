"""The operations of a merge on float32 blocks of rows. numba gives the bits of numpy, the reference.

columns      c_j = sum over i of r_i |R_ij|                     binary64, rows ascending
elect        sum of w_k d_k over the k with the sign of the whole sum, divided by their w_k if normalised
keep_some    total += w d / p if the random number is below p
histogram    counts of |d| by the upper half of their 16 + 16 bits, or, for one upper half, by the lower half
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from peraxis_format.ops.backend import choose

__all__ = ["HALF", "columns", "elect", "histogram", "keep_some"]

Block: TypeAlias = NDArray[np.float32]
Vector: TypeAlias = NDArray[np.float64]

HALF: Final = 1 << 16


def _loops(size: int, backend: str | None) -> Any:
    return import_module(f"peraxis_tools.ops.merge_rows.{choose('merge_rows', size, backend=backend)}")


def columns(block: Block, rows: Vector, *, backend: str | None = None) -> Vector:
    """sum over i of r_i |R_ij|: binary64 [d_in]."""
    out = np.zeros(block.shape[1])
    _loops(block.size, backend).columns(block, rows, out)
    return out


def elect(
    blocks: list[Block], weights: Vector, thresholds: Block, *, normalized: bool, backend: str | None = None
) -> Block:
    """The result of `ties` for deltas of one shape: magnitudes below the threshold count as 0; the sum's sign wins."""
    out = np.empty(blocks[0].shape, np.float32)
    stacked = np.stack([np.ascontiguousarray(block).reshape(-1) for block in blocks])
    _loops(out.size, backend).elect(stacked, weights, thresholds, normalized, out.reshape(-1))
    return out


def keep_some(
    total: Vector,
    block: Block,
    chances: NDArray[np.uint32],
    weight: float,
    density: float,
    *,
    backend: str | None = None,
) -> None:
    """total += weight * (d / p) if the random number / 2^32 is below p = density. total: binary64, as the block."""
    limit, scaled = np.uint64(round(density * 2**32)), np.float32(density)
    flat = np.ascontiguousarray(block).reshape(-1)
    _loops(flat.size, backend).keep_some(total.reshape(-1), flat, chances.reshape(-1), weight, scaled, limit)


def histogram(block: Block, high: int | None, counts: NDArray[np.int64], *, backend: str | None = None) -> None:
    """Count magnitudes by the upper half of their bits, or those of upper half `high` by the lower; adds to counts."""
    bits = np.ascontiguousarray(block).reshape(-1).view(np.uint32)
    _loops(bits.size, backend).histogram(bits, -1 if high is None else high, counts)
