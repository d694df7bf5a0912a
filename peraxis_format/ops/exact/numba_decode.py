"""Decoding of exact updates, compiled with numba (SPEC 6.6). numpy.py is the reference and defines the terms.

A keyed block is decoded class by class. The weights of a class are found 64 at a time (a comparison of 64 bytes gives
64 bits), so unchanged weights cost less than reading them. Steps of class 0 are gathered first and applied as vectors.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from peraxis_format.ops.exact.words import SELECT, classes64, count, equal64, load64, select, trailing

# Any: numba's own annotations do not go through mypy --strict.
numba: Any = import_module("numba")

__all__ = ["decode_blocks"]

_jit = numba.njit(nogil=True, cache=True)


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _field(bits: Any, k: Any) -> Any:
    """k bits from bit address `bits` up; k at most 57."""
    return np.int64((load64(bits >> 3) >> np.uint64(bits & 7)) & ((np.uint64(1) << np.uint64(k)) - np.uint64(1)))


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _unary(low: Any, high: Any) -> Any:
    """Count ones from bit address low up to a zero. Returns (ones, the address after the zero; above high for none)."""
    ones = 0
    while low <= high:
        here = min(trailing(~(load64(low >> 3) >> np.uint64(low & 7))), 57)
        ones += here
        low += here
        if here < 57:
            return ones, low + 1
    return ones, high + 1


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _unaries(low: Any, high: Any, wanted: Any, into: Any) -> Any:
    """Read `wanted` unary numbers, each at most 255, into an array. Returns the end address; above high: too few."""
    j = 0
    previous, here = low - 1, low & -8
    zeros = ~load64(here >> 3) & (~np.uint64(0) << np.uint64(low - here))
    while j < wanted:
        if here > high:
            return high + 1
        for _ in range(min(count(zeros), wanted - j)):
            place = here + trailing(zeros)
            zeros &= zeros - np.uint64(1)
            into[j] = min(place - previous - 1, 255)
            previous = place
            j += 1
        if j < wanted:
            here += 64
            zeros = ~load64(here >> 3)
    return previous + 1


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _classify(w: Any, cls: Any, low: Any, kind: Any) -> Any:
    """Write the class of each weight to cls, and 255 up to a multiple of 512. Returns (groups of 64, highest class)."""
    n, (shift, mask, _) = w.size, kind
    source, target = w.ctypes.data, cls.ctypes.data
    for g in range(n >> 6):
        classes64(w, source + g * 64 * w.itemsize, target + (g << 6), low, shift, mask)
    highest = np.uint8(0)
    for i in range(n >> 6 << 6, n):
        cls[i] = min(max(np.int64((w[i] >> shift) & mask) - low, 0), 15)
    for i in range(n):
        highest = max(highest, cls[i])
    groups = (n + 511) >> 9 << 3
    cls[n : groups << 6] = 255
    return groups, np.int64(highest)


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _apply(w: Any, steps: Any, width: Any) -> None:
    """Move each weight by a zigzag step in the order of all patterns."""
    kind = w.dtype.type
    top = kind(1 << (width - 1))
    full = kind(top + (top - kind(1)))
    for i in range(w.size):
        u, z = w[i], steps[i]
        d = kind(kind(z >> kind(1)) ^ (full if z & kind(1) else kind(0)))
        o = kind(kind(u ^ (full if u >= top else top)) + d)
        w[i] = o ^ (top if o >= top else full)


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _step(u: Any, d: Any, flips: Any, width: Any) -> Any:
    """The pattern d above u. A table of two replaces a branch, which is slow because signs are random."""
    o = (u ^ flips[u >> (width - 1)]) + d
    return o ^ flips[1 - (o >> (width - 1) & 1)]


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _dense(w: Any, low: Any, high: Any, least: Any, kind: Any, scratch: Any) -> Any:
    """Class 0: every weight has a number. Returns both addresses; low above high: malformed."""
    shift, mask, width = kind
    cls, q, steps, flips, _ = scratch
    classes, groups, most = cls.ctypes.data, (w.size + 63) >> 6, np.int64(shift) + 1
    members = 0
    for g in range(groups):
        members += count(equal64(classes + (g << 6), 0))
    if members == 0:
        return low, high
    # Few weights are moved one by one; many are gathered and moved as vectors.
    many = members * 16 > w.size
    if many:
        steps[: w.size] = 0
    low = _unaries(low, high, members, q)
    j = 0
    for g in range(groups if low <= high else 0):
        here = equal64(classes + (g << 6), 0)
        while here:
            i = (g << 6) + trailing(here)
            here &= here - np.uint64(1)
            k = min(least - np.int64((w[i] >> shift) & mask), most)
            ones = np.int64(q[j])
            j += 1
            high -= k if ones < 8 else width
            if ones > 8 or low > high:
                return high + 1, high
            if ones < 8:
                z = (ones << k) | _field(high, k)
                if many:
                    steps[i] = z
                else:
                    w[i] = _step(np.int64(w[i]), (z >> 1) ^ -(z & 1), flips, width)
            else:
                w[i] = _field(high, width)
    if many:
        _apply(w, steps, width)
    return low, high


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _runs(w: Any, groups: Any, highest: Any, low: Any, high: Any, width: Any, scratch: Any) -> Any:
    """Classes 1 to 15: runs of unchanged weights, each ended by one that moves a step. Returns as _dense does."""
    cls, _, _, flips, table = scratch
    classes = cls.ctypes.data
    members, before = np.empty(8, np.uint64), np.empty(8, np.int64)
    # Unary numbers: the remaining zeros of the word at `here`, and the last number.
    previous, here = low - 1, low & -8
    zeros = ~load64(here >> 3) & (~np.uint64(0) << np.uint64(low - here))
    while zeros == 0:
        here += 64
        if here > high:
            return high + 1, high
        zeros = ~load64(here >> 3)
    place = here + trailing(zeros)
    zeros &= zeros - np.uint64(1)
    if place > high:
        return high + 1, high
    v = ((place - previous - 1) << 15) | _field(high - 15, 15)
    previous = place
    for c in range(1, highest + 1):
        s = 15 - c
        for h in range(0, groups, 8):
            many = 0
            for g in range(8):
                many += count(equal64(classes + ((h + g) << 6), c))
            at, passed = v >> s, 0
            if at < many:
                many = 0
                for g in range(8):
                    members[g], before[g] = equal64(classes + ((h + g) << 6), c), many
                    many += count(members[g])
                while at < many:
                    g = -1
                    for k in range(8):
                        g += before[k] <= at
                    i = ((h + g) << 6) + select(members[g], at - before[g], table)
                    high -= c + 1
                    while zeros == 0:
                        here += 64
                        if here > high:
                            return high + 1, high
                        zeros = ~load64(here >> 3)
                    place = here + trailing(zeros)
                    zeros &= zeros - np.uint64(1)
                    if place >= high:
                        return high + 1, high
                    w[i] = _step(np.int64(w[i]), 1 - 2 * _field(high, 1), flips, width)
                    v = ((place - previous - 1) << 15) | _field(high - 15, 15)
                    previous = place
                    passed = at + 1
                    at = passed + (v >> s)
            v -= (many - passed) << s
    # The last run reaches beyond the last weight, but not further than necessary.
    if not 0 <= v - _field(high - 15, 15) < 32768:
        return high + 1, high
    return previous + 1, high


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _keyed(w: Any, A: Any, begin: Any, end: Any, kind: Any, scratch: Any) -> Any:
    """Apply a keyed block. begin, end: addresses of its bytes. Returns whether its bits are well-formed."""
    low, high, width = begin * 8, end * 8, kind[2]
    exceptions, low = _unary(low, high)
    listed = high
    high -= exceptions * (16 + width)
    if low > high or exceptions > w.size:
        return False
    least = np.int64(A - 1)
    groups, highest = _classify(w, scratch[0], least, kind)
    low, high = _dense(w, low, high, least, kind, scratch)
    if low > high:
        return False
    low, high = _runs(w, groups, highest, low, high, width, scratch)
    if low > high or high - low >= 8 or _field(low, high - low):
        return False
    before = np.int64(-1)
    for _ in range(exceptions):
        listed -= 16 + width
        i = _field(listed + width, 16)
        if i <= before or i >= w.size:
            return False
        w[i] = _field(listed, width)
        before = i
    return True


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _gaps(w: Any, begin: Any, end: Any, flips: Any, width: Any) -> Any:
    """Apply a block of gaps. Returns whether its bytes are well-formed."""
    if end - begin < 4:
        return False
    moves, exceptions = _field(begin * 8, 16), _field(begin * 8 + 16, 16)
    listed = (begin + 4) * 8
    values = listed + exceptions * 16
    signs = values + exceptions * width
    here = (signs + moves + 7) >> 3
    if here > end or (moves & 7 and _field(signs + moves, -moves & 7)):
        return False
    before = np.int64(-1)
    for j in range(exceptions):
        i = _field(listed + 16 * j, 16)
        if i <= before or i >= w.size:
            return False
        w[i] = _field(values + width * j, width)
        before = i
    i = np.int64(-1)
    wide = moves * 384 < w.size
    for j in range(moves):
        i += 1
        gap = np.int64(255)
        while gap == 255 and not wide:
            if here >= end:
                return False
            gap = np.int64(load64(here) & np.uint64(255))
            i += gap
            here += 1
        if wide:
            i += np.int64(load64(here) & np.uint64(65535))
            here += 2
        if i >= w.size:
            return False
        w[i] = _step(np.int64(w[i]), 1 - 2 * _field(signs + j, 1), flips, width)
    return here == end


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def decode_blocks(w: Any, index: Any, data: Any, shift: Any, mask: Any, size: Any) -> Any:
    """Apply blocks to weights in place.

    w: uint16 or uint32 [n]. index: uint32, an entry for each `size` weights. data: uint8, the blocks' bytes with 16
    more before and after. shift, mask: of the exponent. Returns the first malformed block, or -1.
    """
    width = w.itemsize * 8
    cls, q, steps = np.empty(size + 512, np.uint8), np.empty(size, np.uint8), np.empty(size, w.dtype)
    flips = np.empty(2, np.int64)
    flips[0], flips[1] = np.int64(1) << (width - 1), (np.int64(1) << width) - 1
    kind, scratch, offset = (shift, mask, width), (cls, q, steps, flips, SELECT), np.int64(16)
    for b in range(index.size):
        A, length = np.int64(index[b] & np.uint32(255)), np.int64(index[b] >> np.uint32(8))
        part = w[b * size : min((b + 1) * size, w.size)]
        begin = data.ctypes.data + offset
        if A == 255:
            part[:] = data[offset : offset + length].view(w.dtype)
        elif A:
            if not _keyed(part, A, begin, begin + length, kind, scratch):
                return b
        elif length and not _gaps(part, begin, begin + length, flips, width):
            return b
        offset += length
    return -1
