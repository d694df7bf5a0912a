"""Sums over the signs of two masks: how many differ, and what a weighting of the columns adds up to.

    differing[i] = popcount(A_i xor B_i)
    sums[i]      = sum_j w_j b^A_ij b^B_ij  =  sum_j w_j  -  2 sum of w_j where A_ij xor B_ij is 1

The last sum takes a table lookup a byte: table[c, x] is what those of the eight columns of byte c add up to whose
bits in x are 1. Masks are read as 64-bit words, and a word's eight tables (8 KiB)
stay in the first-level cache while a block of rows passes. With numba the loops are compiled and hold no lock;
without it numpy does the same, more slowly. Rejected: unpacking the signs for a matrix product, which moves 64 times
the bytes. Tables are binary32, sums binary64: only what differs is summed, so the error is relative to the difference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["byte_tables", "differing_bits", "differing_sums"]

Mask: TypeAlias = NDArray[np.uint8]
Vector: TypeAlias = NDArray[np.float64]
Table: TypeAlias = NDArray[np.float32]

_ROWS: Final = 512  # rows of one pass: their words stay in the second-level cache between two columns of words
_BYTE_COUNT: Final = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1).astype(np.uint8)
_NUMPY_BLOCK: Final = 1 << 20


def byte_tables(weights: Vector, width: int) -> Table:
    """table[c, x] for column weights [d_in] and rows of `width` bytes: binary32 [width', 256], width' whole words."""
    width += -width % 8
    padded = np.zeros(width * 8, np.float32)
    padded[: weights.shape[0]] = weights
    table = np.zeros((width, 256), np.float32)
    for bit, column in enumerate(padded.reshape(width, 8).T):
        # Those x with the highest bit `bit` are those below it, plus this bit's column.
        np.add(table[:, : 1 << bit], column[:, None], out=table[:, 1 << bit : 2 << bit])
    return table


def differing_bits(a: Mask, b: Mask) -> NDArray[np.int64]:
    """Bits of each row that differ: int64 [d_out]. a, b: [d_out, width]."""
    compiled = _compiled()
    if compiled is None:
        return np.concatenate([_BYTE_COUNT[x].sum(axis=1, dtype=np.int64) for x in _xor_blocks(a, b)])
    out = np.zeros(a.shape[0], np.int64)
    compiled[0](_words(a), _words(b), out)
    return out


def differing_sums(a: Mask, b: Mask, table: Table) -> Vector:
    """For each row the sum of w_j where the bits differ: binary64 [d_out]. table: of `byte_tables`."""
    compiled = _compiled()
    if compiled is None:
        columns = np.arange(a.shape[1])
        return np.concatenate([table[columns, x].sum(axis=1, dtype=np.float64) for x in _xor_blocks(a, b)])
    out = np.zeros(a.shape[0])
    compiled[1](_words(a), _words(b), table.reshape(-1, 8 * 256), out)
    return out


def _words(mask: Mask) -> NDArray[np.uint64]:
    """A mask as 64-bit words, each row filled up with zeros; a view where that is possible."""
    rows, width = mask.shape
    if width % 8:
        padded = np.zeros((rows, width + -width % 8), np.uint8)
        padded[:, :width] = mask
        mask = padded
    return np.require(np.ascontiguousarray(mask).view(np.uint64), requirements="A")


def _xor_blocks(a: Mask, b: Mask) -> list[Mask]:
    step = max(1, _NUMPY_BLOCK // a.shape[1])
    return [a[i : i + step] ^ b[i : i + step] for i in range(0, a.shape[0], step)]


@functools.cache
def _compiled() -> tuple[Callable[..., None], Callable[..., None]] | None:
    try:
        import numba
    except ImportError:
        return None
    options: dict[str, Any] = {"nogil": True, "cache": True}
    return numba.njit(**options)(_differing_loop), numba.njit(**options)(_sum_loop)


def _differing_loop(a: Any, b: Any, out: Any) -> None:
    rows, words = a.shape
    for i in range(rows):
        total = np.int64(0)
        for c in range(words):
            # The sums of bits by pairs, fours and bytes; the product adds the bytes up in the highest one.
            x = a[i, c] ^ b[i, c]
            x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
            x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
            x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
            total += np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))
        out[i] = total


def _sum_loop(a: Any, b: Any, table: Any, out: Any) -> None:
    rows, words = a.shape
    low = np.uint64(255)
    for begin in range(0, rows, _ROWS):
        end = min(begin + _ROWS, rows)
        for c in range(words):
            t = table[c]
            for i in range(begin, end):
                x = a[i, c] ^ b[i, c]
                s0 = t[x & low] + t[np.uint64(256) + ((x >> np.uint64(8)) & low)]
                s1 = t[np.uint64(512) + ((x >> np.uint64(16)) & low)] + t[np.uint64(768) + ((x >> np.uint64(24)) & low)]
                s2 = (
                    t[np.uint64(1024) + ((x >> np.uint64(32)) & low)]
                    + t[np.uint64(1280) + ((x >> np.uint64(40)) & low)]
                )
                s3 = t[np.uint64(1536) + ((x >> np.uint64(48)) & low)] + t[np.uint64(1792) + (x >> np.uint64(56))]
                out[i] += np.float64((s0 + s1) + (s2 + s3))
