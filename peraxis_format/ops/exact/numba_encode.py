"""Encoding of exact updates, compiled with numba (SPEC 6.6). numpy.py is the reference and defines the terms."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from peraxis_format.ops.exact.numba_keyed import keyed_block
from peraxis_format.ops.exact.words import count, nonzero64, trailing

# Any: numba's own annotations do not go through mypy --strict.
numba: Any = import_module("numba")

__all__ = ["encode_blocks"]

_jit = numba.njit(nogil=True, cache=True)


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _steps(old: Any, new: Any, steps: Any, width: Any) -> Any:
    """Write the zigzag step from each old pattern to the new one. Returns whether any is not 0."""
    kind = old.dtype.type
    top, one = kind(1 << (width - 1)), kind(1)
    full = kind(top + (top - one))
    any_ = kind(0)
    for i in range(old.size):
        a, b = old[i], new[i]
        d = kind(kind(b ^ (full if b >= top else top)) - kind(a ^ (full if a >= top else top)))
        z = kind(kind(d << one) ^ (full if d >= top else kind(0)))
        steps[i] = z
        any_ |= z
    return any_ != 0


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _bit_length(z: Any) -> Any:
    """The bit length of a number below 2^32; 0 for 0."""
    return np.int64(np.float64(z).view(np.int64) >> 52) - 1022 if z else 0


def _bucket_table() -> NDArray[np.uint8]:
    """The bucket of a small number: 0 for 0, 1 and 2 for a step of one, 3 for 3, else one more than its bit length."""
    return np.array([z if z < 4 else z.bit_length() + 1 for z in range(1 << 10)], np.uint8)


_BUCKETS: Final = _bucket_table()


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _survey(old: Any, steps: Any, kind: Any, tables: Any, buckets: Any) -> Any:
    """Count by exponent: weights, steps of one, longer steps, and for each k the unary ones of class 0 (SPEC 11.3).

    buckets: _BUCKETS.
    Returns the total numbers of steps of one and of longer steps.
    """
    n, (shift, mask, width) = old.size, kind
    members, ones, big, dense = tables
    ones[:] = 0
    big[:] = 0
    # Four of each, because counting in one place waits for the count before.
    four, found = np.zeros((4, 256), np.int64), np.zeros((4, 256, 35), np.int64)
    for i in range(0, n - 3, 4):
        for lane in range(4):
            four[lane, (old[i + lane] >> shift) & mask] += 1
    for i in range(n & -4, n):
        four[0, (old[i] >> shift) & mask] += 1
    for g in range((n + 63) >> 6):
        moved = nonzero64(steps, steps.ctypes.data + g * 64 * steps.itemsize)
        if count(moved) > 20 and (g + 1) << 6 <= n:
            for i in range(g << 6, (g + 1) << 6):
                z = np.int64(steps[i])
                bucket = np.int64(buckets[z]) if z < buckets.size else _bit_length(z) + 1
                found[i & 3, (old[i] >> shift) & mask, bucket] += 1
            continue
        while moved:
            i = (g << 6) + trailing(moved)
            moved &= moved - np.uint64(1)
            z = np.int64(steps[i])
            bucket = np.int64(buckets[z]) if z < buckets.size else _bit_length(z) + 1
            found[i & 3, (old[i] >> shift) & mask, bucket] += 1
    moves, exceptions = np.int64(0), np.int64(0)
    for e in range(256):
        members[e] = four[0, e] + four[1, e] + four[2, e] + four[3, e]
        dense[e] = 0
        for bucket in range(1, 35 if members[e] else 0):
            here = found[0, e, bucket] + found[1, e, bucket] + found[2, e, bucket] + found[3, e, bucket]
            ones[e] += here if bucket < 3 else 0
            big[e] += here if bucket > 2 else 0
            length = bucket if bucket < 3 else bucket - 1
            for k in range(dense.shape[1] if here else 0):
                unary = (np.int64(3) << length >> 2) >> k
                dense[e, k] += here * (unary if unary < 8 else 8 + width - k)
        moves += ones[e]
        exceptions += big[e]
    return moves, exceptions


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _choose(tables: Any, width: Any) -> Any:
    """The A from 1 to 254 of least cost; of equals the highest (SPEC 11.3)."""
    members, ones, big, dense = tables
    lowest, highest = 255, 0
    for e in range(256):
        if members[e]:
            lowest, highest = min(lowest, e), max(highest, e)
    best, choice = np.int64(1) << 62, 1
    for A in range(max(lowest - 15, 1), min(highest + dense.shape[1], 254) + 1):
        cost, mass = np.int64(0), np.int64(0)
        for e in range(lowest, highest + 1):
            if e >= A:
                c = min(e - A + 1, 15)
                cost += ones[e] * (c + 2) + big[e] * (17 + width)
                mass += (members[e] - ones[e]) << (15 - c)
            else:
                k = min(A - 1 - e, dense.shape[1] - 1)
                cost += members[e] * (k + 1) + dense[e, k]
        cost += mass >> 15
        if cost <= best:
            best, choice = cost, A
    return choice


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _gaps(new: Any, steps: Any, width: Any, out: Any, limit: Any) -> Any:
    """Write a block of gaps. Returns its length, or limit if it would be longer."""
    n = new.size
    moves, exceptions, long = 0, 0, np.int64(0)
    before = -1
    for g in range((n + 63) >> 6):
        moved = nonzero64(steps, steps.ctypes.data + g * 64 * steps.itemsize)
        while moved:
            i = (g << 6) + trailing(moved)
            moved &= moved - np.uint64(1)
            if steps[i] > 2:
                exceptions += 1
            else:
                moves += 1
                long += (i - before - 1) // 255
                before = i
    values = 4 + 2 * exceptions
    signs = values + exceptions * width // 8
    at = signs + ((moves + 7) >> 3)
    wide = moves * 384 < n
    length = at + (2 * moves if wide else moves + long)
    if length >= limit or moves > 65535 or exceptions > 65535:
        return limit
    out[:length] = 0
    out[0], out[1], out[2], out[3] = moves & 255, moves >> 8, exceptions & 255, exceptions >> 8
    listed, before, j = 4, -1, 0
    for g in range((n + 63) >> 6):
        moved = nonzero64(steps, steps.ctypes.data + g * 64 * steps.itemsize)
        while moved:
            i = (g << 6) + trailing(moved)
            moved &= moved - np.uint64(1)
            if steps[i] > 2:
                out[listed], out[listed + 1] = i & 255, i >> 8
                listed += 2
                for byte in range(width // 8):
                    out[values] = (np.int64(new[i]) >> (8 * byte)) & 255
                    values += 1
                continue
            gap = i - before - 1
            if wide:
                out[at], out[at + 1] = gap & 255, gap >> 8
                at += 1
                gap = 0
            while gap >= 255:
                out[at] = 255
                at += 1
                gap -= 255
            if not wide:
                out[at] = gap
            at += 1
            out[signs + (j >> 3)] |= (np.int64(steps[i]) & 1) << (j & 7)
            j += 1
            before = i
    return length


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def encode_blocks(old: Any, new: Any, shift: Any, mask: Any, size: Any, keyed: Any, out: Any, index: Any) -> Any:
    """Encode the step from old to new. keyed: whether blocks may be keyed. Returns the bytes written.

    old, new: uint16 or uint32 [n], C-contiguous. out: uint8, at least n * itemsize. index: uint32 [ceil(n / size)],
    written.
    """
    width = old.itemsize * 8
    steps, cls = np.zeros(size + 64, old.dtype), np.empty(size + 512, np.uint8)
    q, fields, widths = (
        np.empty(size + 2, np.int32),
        np.empty(2 * size + 2, np.uint32),
        np.empty(2 * size + 2, np.uint8),
    )
    # A weight has at most 9 unary bits, and as an exception 16 + width bits of fields.
    up, down = np.empty(size // 2 + 4, np.uint32), np.empty(size * (16 + width) // 32 + 4, np.uint32)
    members, ones, big = np.empty(256, np.int64), np.empty(256, np.int64), np.empty(256, np.int64)
    dense = np.empty((256, shift + 2), np.int64)
    trial = np.empty(size * old.itemsize, np.uint8)
    kind, tables, parts = (shift, mask, width), (members, ones, big, dense), (cls, q, fields, widths, up, down)
    total = np.int64(0)
    for b in range(index.size):
        a, c = old[b * size : min((b + 1) * size, old.size)], new[b * size : min((b + 1) * size, old.size)]
        index[b] = 0
        if not _steps(a, c, steps, width):
            continue
        steps[a.size : (a.size + 63) & -64] = 0
        limit = a.size * old.itemsize
        A, length = 255, limit
        if not keyed:
            length = _gaps(c, steps, width, out[total:], limit * 3 // 4 + 1)
            A = 0 if length <= limit * 3 // 4 else 255
        else:
            moves, exceptions = _survey(a, steps, kind, tables, _BUCKETS)
            chosen = _choose(tables, width)
            length = keyed_block(a, c, steps, chosen, kind, parts, out[total:], limit)
            if length < limit:
                A = chosen
            # Keyed wins ties. The least size of a block of gaps is known before it is written.
            if 4 + moves + (moves + 7) // 8 + exceptions * (2 + old.itemsize) < length:
                _steps(a, c, steps, width)
                other = _gaps(c, steps, width, trial, length)
                if other < length:
                    A, length = 0, other
                    out[total : total + length] = trial[:length]
        if A == 255:
            length = limit
            out[total : total + limit] = c.view(np.uint8)
        index[b] = length << 8 | A
        total += length
    return total
