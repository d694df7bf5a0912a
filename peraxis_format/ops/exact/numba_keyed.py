"""The writer of a keyed block (SPEC 5.9), compiled with numba: two streams that are joined at the end.

A stream is (words, held bits, their number, place of the next word). Unary numbers fill `up` from the lowest bit up,
fields fill `down` from the highest bit down.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from peraxis_format.ops.exact.words import classes64, count, equal64, nonzero64, trailing

# Any: numba's own annotations do not go through mypy --strict.
numba: Any = import_module("numba")

__all__ = ["keyed_block"]

_jit = numba.njit(nogil=True, cache=True)


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _push_unary(q: Any, qs: Any, up: Any, acc: Any, held: Any, at: Any) -> Any:
    """Write the first numbers of q. Returns acc, held, at."""
    for j in range(qs):
        ones = np.int64(q[j])
        while ones > 30:
            acc |= np.uint64(0x7FFFFFFF) << np.uint64(held)
            held += 31
            ones -= 31
            if held >= 32:
                up[at] = np.uint32(acc)
                acc >>= np.uint64(32)
                held -= 32
                at += 1
        acc |= ((np.uint64(1) << np.uint64(ones)) - np.uint64(1)) << np.uint64(held)
        held += ones + 1
        if held >= 32:
            up[at] = np.uint32(acc)
            acc >>= np.uint64(32)
            held -= 32
            at += 1
    return acc, held, at


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _push_fields(fields: Any, widths: Any, fs: Any, down: Any, acc: Any, held: Any, last: Any) -> Any:
    """Write the first fields. Returns acc, held, last."""
    for j in range(fs):
        acc = acc << np.uint64(widths[j]) | np.uint64(fields[j])
        held += np.int64(widths[j])
        if held >= 32:
            held -= 32
            last -= 1
            down[last] = np.uint32(acc >> np.uint64(held))
    return acc, held, last


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _class_0(old: Any, new: Any, steps: Any, least: Any, kind: Any, parts: Any, low: Any, high: Any) -> Any:
    """Write the numbers of class 0. low, high: the states of both streams. Returns them."""
    (shift, mask, width), (cls, _, _, _, up, down) = kind, parts
    (low_acc, low_held, at), (high_acc, high_held, last) = low, high
    most, one = np.int64(shift) + 1, np.uint64(1)
    for g in range((old.size + 63) >> 6):
        here = equal64(cls.ctypes.data + (g << 6), 0)
        while here:
            i = (g << 6) + trailing(here)
            here &= here - one
            z, k = np.uint64(steps[i]), np.uint64(min(least - np.int64((old[i] >> shift) & mask), most))
            ones, field, bits = z >> k, z & ((one << k) - one), k
            if ones >= np.uint64(8):
                ones, field, bits = np.uint64(8), np.uint64(new[i]), np.uint64(width)
            # Words are stored whether they are full or not, because a branch would often be mispredicted.
            low_acc |= ((one << ones) - one) << np.uint64(low_held)
            low_held += np.int64(ones) + 1
            up[at] = np.uint32(low_acc)
            low_acc >>= np.uint64(low_held & 32)
            at += low_held >> 5
            low_held &= 31
            high_acc = high_acc << bits | field
            high_held += np.int64(bits)
            down[last - 1] = np.uint32(high_acc >> np.uint64(high_held & 31))
            last -= high_held >> 5
            high_held &= 31
    return (low_acc, low_held, at), (high_acc, high_held, last)


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _exceptions(new: Any, steps: Any, width: Any, parts: Any) -> Any:
    """List the exceptions as fields, and take their steps out. Returns their number."""
    cls, _, fields, widths, _, _ = parts
    found = 0
    for g in range((new.size + 63) >> 6):
        moved = nonzero64(steps, steps.ctypes.data + g * 64 * steps.itemsize)
        moved &= ~equal64(cls.ctypes.data + (g << 6), 0)
        while moved:
            i = (g << 6) + trailing(moved)
            moved &= moved - np.uint64(1)
            if steps[i] > 2:
                fields[2 * found], widths[2 * found] = i, 16
                fields[2 * found + 1], widths[2 * found + 1] = new[i], width
                found += 1
                steps[i] = 0
    return found


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _runs(groups: Any, steps: Any, parts: Any) -> Any:
    """List the runs of classes 1 to 15 as unary numbers and fields. Returns the number of each."""
    cls, q, fields, widths, _, _ = parts
    qs, run = 0, np.int64(0)
    for c in range(1, 16):
        s = 15 - c
        for g in range(groups):
            here = equal64(cls.ctypes.data + (g << 6), c)
            moved = here & nonzero64(steps, steps.ctypes.data + g * 64 * steps.itemsize)
            while moved:
                place = np.uint64(trailing(moved))
                moved &= moved - np.uint64(1)
                run += count(here & ((np.uint64(1) << place) - np.uint64(1))) << s
                here &= ~np.uint64(0) << place & ~(np.uint64(1) << place)
                q[qs] = run >> 15
                fields[qs] = ((run & 32767) >> s) << 1 | (np.int64(steps[(g << 6) + np.int64(place)]) & 1)
                widths[qs] = c + 1
                qs += 1
                run = np.int64(0)
            run += count(here) << s
    q[qs] = (run + 32767) >> 15
    return qs + 1, qs


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def keyed_block(old: Any, new: Any, steps: Any, A: Any, kind: Any, parts: Any, out: Any, limit: Any) -> Any:
    """Write a keyed block to out. Returns its length, or limit if it would be longer."""
    (shift, mask, width), (cls, q, fields, widths, up, down) = kind, parts
    n, least = old.size, np.int64(A - 1)
    groups = (n + 63) >> 6
    for g in range(n >> 6):
        classes64(old, old.ctypes.data + g * 64 * old.itemsize, cls.ctypes.data + (g << 6), least, shift, mask)
    for i in range(n >> 6 << 6, n):
        cls[i] = min(max(np.int64((old[i] >> shift) & mask) - least, 0), 15)
    cls[n : groups << 6] = 255
    q[0] = _exceptions(new, steps, width, parts)
    low = _push_unary(q, 1, up, np.uint64(0), np.int64(0), np.int64(0))
    high = _push_fields(fields, widths, 2 * q[0], down, np.uint64(0), np.int64(0), np.int64(down.size))
    low, high = _class_0(old, new, steps, least, kind, parts, low, high)
    qs, fs = _runs(groups, steps, parts)
    acc, held, at = _push_unary(q, qs, up, low[0], low[1], low[2])
    up[at] = np.uint32(acc)
    ones = at * 32 + held
    acc, held, last = _push_fields(fields, widths, fs, down, high[0], high[1], high[2])
    down[last - 1] = np.uint32(acc << np.uint64(32 - held))
    return _joined(up, ones, down, (down.size - last) * 32 + held, out, limit)


@_jit  # type: ignore[untyped-decorator, unused-ignore]
def _joined(up: Any, ones: Any, down: Any, room: Any, out: Any, limit: Any) -> Any:
    """Join both streams, of `ones` and `room` bits. Returns the block's length, or limit if it would be longer."""
    length = (ones + room + 7) >> 3
    if length >= limit:
        return limit
    low, high = up.view(np.uint8), down.view(np.uint8)
    unary = (ones + 7) >> 3
    first = length - ((room + 7) >> 3)
    out[first:length] = high[high.size - (length - first) :]
    # Both meet in at most one byte.
    met = out[first] if first < unary else np.uint8(0)
    out[:unary] = low[:unary]
    if first < unary:
        out[first] |= met
    return length
