"""merge_rows compiled with numba, with the bits of numpy.py. The loops release the GIL."""

# mypy: allow-untyped-decorators
# numba has no type information.

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import numpy as np

numba: Any = import_module("numba")

_PART: Final = 1024  # weights in one pass, whose sums fit into the first-level cache

__all__ = ["columns", "elect", "histogram", "keep_some"]


@numba.njit(nogil=True, cache=True)
def columns(block: Any, rows: Any, out: Any) -> None:
    for i in range(block.shape[0]):
        weight = rows[i]
        for j in range(block.shape[1]):
            out[j] += weight * abs(np.float64(block[i, j]))


@numba.njit(nogil=True, cache=True)
def elect(blocks: Any, weights: Any, thresholds: Any, normalized: Any, out: Any) -> None:
    """blocks: float32 [inputs, weights]. Selections replace branches, which a processor would mispredict."""
    zero = np.float64(0.0)
    whole, total, divisor = np.empty(_PART), np.empty(_PART), np.empty(_PART)
    for begin in range(0, blocks.shape[1], _PART):
        part = out[begin : begin + _PART]
        count = part.shape[0]
        whole[:] = total[:] = divisor[:] = zero
        for k in range(blocks.shape[0]):
            values, weight, least = blocks[k, begin : begin + _PART], weights[k], thresholds[k]
            for j in range(count):
                term = weight * np.float64(values[j])
                whole[j] += term if abs(values[j]) >= least else zero
        for k in range(blocks.shape[0]):
            values, weight, least = blocks[k, begin : begin + _PART], weights[k], thresholds[k]
            for j in range(count):
                term = weight * np.float64(values[j])
                kept = (abs(values[j]) >= least) & (term != zero) & ((term > zero) == (whole[j] >= zero))
                total[j] += term if kept else zero
                divisor[j] += weight if kept else zero
        for j in range(count):
            by = divisor[j] if normalized & (abs(divisor[j]) > 1e-8) else np.float64(1.0)
            part[j] = total[j] / by


@numba.njit(nogil=True, cache=True)
def keep_some(total: Any, block: Any, chances: Any, weight: Any, density: Any, limit: Any) -> None:
    for j in range(block.shape[0]):
        total[j] += weight * np.float64(block[j] / density) if np.uint64(chances[j]) < limit else 0.0


@numba.njit(nogil=True, cache=True)
def histogram(bits: Any, high: Any, counts: Any) -> None:
    """bits: uint32, bits of binary32; the sign is ignored. high: the upper half to count, -1 for all."""
    for j in range(bits.shape[0]):
        size = bits[j] & np.uint32(0x7FFFFFFF)
        half = np.int64(size >> np.uint32(16))
        if high < 0:
            counts[half] += 1
        elif half == high:
            counts[np.int64(size & np.uint32(0xFFFF))] += 1
