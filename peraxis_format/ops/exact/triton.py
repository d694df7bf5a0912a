"""Exact updates on a GPU: one warp decodes one block (SPEC 5.8, 5.9). The bits are those of numpy.py.

A block is a serial stream, so all lanes of a program read it number by number. Parallel are the blocks, and within a
block the search for the weights of the numbers, a tile of weights at a time. Programs of one warp need no barriers: on
an H100 four warps were up to 8 times slower. The weights of each class in a tile are counted before, by a program for
each tile, so that an unchanged tile takes one check. Weights are read from `old` and written to `new`, a copy of it,
because exponents must be those of the old weights.

`data` is read in words of 32 bits; it has at least 16 more bytes on both sides. Addresses are in bits or bytes of it.
`sound` is set to 1 for a well-formed block.
"""

# Triton reads the annotations of a kernel: constants have one, other arguments must have none.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import Final

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

__all__ = ["TILE", "count_kernel", "exact_kernel"]

TILE: Final = 1024


@triton.jit
def _word(data, bits):
    """The 32 bits from a bit address up, as an int64."""
    at = data + (bits >> 5)
    pair = (tl.load(at).to(tl.int64) & 0xFFFFFFFF) | (tl.load(at + 1).to(tl.int64) << 32)
    return (pair >> (bits & 31)) & 0xFFFFFFFF


@triton.jit
def _field(data, bits, k):
    """k bits from a bit address up, at most 32."""
    one = tl.full((), 1, tl.int64)
    return _word(data, bits) & ((one << k) - 1)


@triton.jit
def _unary(data, low, high):
    """The number of ones up to a zero, and the address after it; above high if there is none."""
    start = low
    ones = tl.full((), 32, tl.int64)
    while (ones == 32) & (low < high):
        word = _word(data, low)
        # The lowest zero is a power of two, so its place is its exponent in binary32.
        zero = ((word + 1) & ~word).to(tl.float32)
        ones = (zero.to(tl.int32, bitcast=True) >> 23).to(tl.int64) - 127
        low += ones
    low = tl.minimum(low, tl.maximum(high, start))
    return low - start, tl.where(low < high, low + 1, high + 1)


@triton.jit
def _moved(u, d, WIDTH: tl.constexpr):
    """Patterns (int64) moved by d in the order of all patterns."""
    top = tl.full((), 1, tl.int64) << (WIDTH - 1)
    o = (u ^ tl.where(u >= top, 2 * top - 1, top)) + d
    o = o & (2 * top - 1)
    return o ^ tl.where(o >= top, top, 2 * top - 1)


@triton.jit
def _exponents(old, begin, count, tile, MANTISSA: tl.constexpr, MASK: tl.constexpr, N: tl.constexpr):
    """Places within the block, and exponents (-1 beyond it) of a tile of weights; int32 [N]."""
    lanes = (tile * N).to(tl.int32) + tl.arange(0, N)
    inside = lanes < count
    u = tl.load(old + begin + lanes, mask=inside, other=0).to(tl.int32)
    return lanes, tl.where(inside, (u >> MANTISSA) & MASK, -1)


@triton.jit
def _gaps(old, new, data, begin, count, at, end, WIDTH: tl.constexpr):
    """Apply a block of gaps. Returns whether it is well-formed."""
    moves, exceptions = _field(data, at * 8, 16), _field(data, at * 8 + 16, 16)
    values = at + 4 + 2 * exceptions
    signs = values + exceptions * (WIDTH // 8)
    here = signs + (moves + 7) // 8
    ok = (here <= end).to(tl.int32)
    j = tl.full((), 0, tl.int64)
    while j < tl.where(ok == 1, exceptions, 0):
        place = _field(data, (at + 4 + 2 * j) * 8, 16)
        if place < count:
            tl.store(new + begin + place, _field(data, (values + j * (WIDTH // 8)) * 8, WIDTH))
        else:
            ok = 0
        j += 1
    place = tl.full((), -1, tl.int64)
    wide = moves * 384 < count
    j = tl.full((), 0, tl.int64)
    while j < tl.where(ok == 1, moves, 0):
        gap = tl.full((), 0, tl.int64)
        if wide:
            gap = _field(data, here * 8, 16)
            here += 2
        else:
            byte = _field(data, here * 8, 8)
            here += 1
            while (byte == 255) & (here < end):
                gap += 255
                byte = _field(data, here * 8, 8)
                here += 1
            gap += byte
        place += gap + 1
        if (place < count) & (here <= end):
            u = tl.load(old + begin + place).to(tl.int64) & ((1 << WIDTH) - 1)
            tl.store(new + begin + place, _moved(u, 1 - 2 * _field(data, signs * 8 + j, 1), WIDTH))
        else:
            ok = 0
        j += 1
    return ok & (here == end).to(tl.int32)


@triton.jit
def _numbered(old, new, data, place, mode, low, high, MANTISSA: tl.constexpr, MASK: tl.constexpr, WIDTH: tl.constexpr):
    """Read the number of one weight of class 0. Returns low, high, and whether they are valid."""
    u = tl.load(old + place).to(tl.int64) & ((1 << WIDTH) - 1)
    q, low = _unary(data, low, high)
    k = tl.minimum(mode - 1 - ((u >> MANTISSA) & MASK), MANTISSA + 1)
    high = high - tl.where(q == 8, WIDTH, k)
    ok = ((q <= 8) & (low <= high)).to(tl.int32)
    if ok == 1:
        word = _word(data, high)
        z = (q << k) | (word & ((tl.full((), 1, tl.int64) << k) - 1))
        moved = _moved(u, (z >> 1) ^ -(z & 1), WIDTH)
        tl.store(new + place, tl.where(q == 8, word & ((1 << WIDTH) - 1), moved))
    return low, high, ok


@triton.jit
def _class_0(
    old, new, data, begin, count, mode, low, high, ok,
    MANTISSA: tl.constexpr, MASK: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Every weight of class 0 has a number. Returns low, high, and whether the block is well-formed so far."""
    tile = tl.full((), 0, tl.int64)
    while tile < tl.where(ok == 1, (count + N - 1) // N, 0):
        lanes, es = _exponents(old, begin, count, tile, MANTISSA, MASK, N)
        left = (es >= 0) & (es < mode)
        members = tl.sum(left.to(tl.int32))
        if members * 8 > N:
            # Many weights: check each in turn.
            place, end = begin + tile * N, begin + tl.minimum(tile * N + N, count)
            while place < tl.where(ok == 1, end, 0):
                u = tl.load(old + place).to(tl.int64)
                if ((u >> MANTISSA) & MASK) < mode:
                    low, high, ok = _numbered(old, new, data, place, mode, low, high, MANTISSA, MASK, WIDTH)
                place += 1
        else:
            while members > 0:
                place = tl.min(tl.where(left, lanes, 1 << 30))
                left = left & (lanes != place)
                members -= 1
                low, high, ok = _numbered(old, new, data, begin + place, mode, low, high, MANTISSA, MASK, WIDTH)
                members = tl.where(ok == 1, members, 0)
        tile += 1
    return low, high, ok


@triton.jit
def count_kernel(
    old, index, counts, weights,
    MANTISSA: tl.constexpr, MASK: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """counts: int32 [blocks, SIZE / N, 16], the numbers of weights of classes 1 to 15 in each tile of a keyed block."""
    block, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    mode = tl.load(index + block) & 255
    begin = block * SIZE
    if (mode > 0) & (mode < 255):
        _, es = _exponents(old, begin, tl.minimum(weights - begin, SIZE), tile, MANTISSA, MASK, N)
        cs = tl.where(es >= 0, tl.minimum(es - mode.to(tl.int32) + 1, 15), 0)
        for c in range(1, 16):
            tl.store(counts + (block * (SIZE // N) + tile) * 16 + c, tl.sum((cs == c).to(tl.int32)))


@triton.jit
def _runs(
    old, new, data, counts, begin, count, mode, low, high, ok,
    MANTISSA: tl.constexpr, MASK: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Classes 1 to 15: runs of unchanged weights, each followed by a step of one. Returns low, high, ok."""
    q, low = _unary(data, low, high)
    ok = ok & (low <= high).to(tl.int32)
    v = (q << 15) | _field(data, high - 15, 15)
    for c in range(1, 16):
        tile = tl.full((), 0, tl.int64)
        while tile < tl.where(ok == 1, (count + N - 1) // N, 0):
            members, taken = tl.load(counts + tile * 16 + c).to(tl.int64), tl.full((), 0, tl.int64)
            if (v >> (15 - c)) < members:
                lanes, es = _exponents(old, begin, count, tile, MANTISSA, MASK, N)
                own = (es >= 0) & (tl.minimum(es - mode + 1, 15) == c)
                rank = tl.cumsum(own.to(tl.int32)) - 1
                while (ok == 1) & ((v >> (15 - c)) < members - taken):
                    taken += (v >> (15 - c)) + 1
                    place = begin + tl.sum(tl.where(own & (rank == taken - 1), lanes, 0))
                    u = tl.load(old + place).to(tl.int64) & ((1 << WIDTH) - 1)
                    high = high - (c + 1)
                    q, low = _unary(data, low, high)
                    ok = (low <= high).to(tl.int32)
                    if ok == 1:
                        tl.store(new + place, _moved(u, 1 - 2 * _field(data, high, 1), WIDTH))
                    v = (q << 15) | _field(data, high - 15, 15)
            v = v - ((members - taken) << (15 - c))
            tile += 1
    rest = v - _field(data, high - 15, 15)
    return low, high, ok & ((rest >= 0) & (rest < 32768)).to(tl.int32)


@triton.jit
def _keyed(
    old, new, data, counts, begin, count, mode, at, end,
    MANTISSA: tl.constexpr, MASK: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Apply a keyed block. Returns whether it is well-formed."""
    high = end * 8
    exceptions, low = _unary(data, at * 8, high)
    listed = high
    high = high - exceptions * (16 + WIDTH)
    ok = (low <= high).to(tl.int32)
    low, high, ok = _class_0(old, new, data, begin, count, mode, low, high, ok, MANTISSA, MASK, WIDTH, N)
    low, high, ok = _runs(old, new, data, counts, begin, count, mode, low, high, ok, MANTISSA, MASK, WIDTH, N)
    ok = ok & ((high - low < 8) & (high >= low)).to(tl.int32)
    if ok == 1:
        ok = (_field(data, low, high - low) == 0).to(tl.int32)
    j = tl.full((), 0, tl.int64)
    while j < tl.where(ok == 1, exceptions, 0):
        listed = listed - (16 + WIDTH)
        place = _field(data, listed + WIDTH, 16)
        if place < count:
            tl.store(new + begin + place, _field(data, listed, WIDTH))
        else:
            ok = 0
        j += 1
    return ok


@triton.jit
def exact_kernel(
    old, new, index, ends, data, counts, sound, weights,
    MANTISSA: tl.constexpr, MASK: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Decode one block with one warp. old, new: int16 or int32 [weights]. index: int64 [blocks], ends: of their bytes.

    data: int32, from 16 bytes before the first block on. counts: those of count_kernel.
    """
    block = tl.program_id(0).to(tl.int64)
    entry = tl.load(index + block)
    mode, length = entry & 255, entry >> 8
    end = tl.load(ends + block) + 16
    begin = block * SIZE
    count = tl.minimum(weights - begin, SIZE)
    ok = tl.full((), 1, tl.int32)
    if mode == 255:
        raw = data.to(tl.pointer_type(tl.uint8))
        tile = tl.full((), 0, tl.int64)
        while tile < (count + N - 1) // N:
            lanes = tile * N + tl.arange(0, N)
            inside = lanes < count
            value = tl.full((N,), 0, tl.int64)
            for byte in range(WIDTH // 8):
                at = raw + (end - length) + lanes * (WIDTH // 8) + byte
                value = value | (tl.load(at, mask=inside, other=0).to(tl.int64) << (8 * byte))
            tl.store(new + begin + lanes, value, mask=inside)
            tile += 1
    elif mode > 0:
        of_block = counts + block * (SIZE // N) * 16
        ok = _keyed(old, new, data, of_block, begin, count, mode, end - length, end, MANTISSA, MASK, WIDTH, N)
    elif length > 0:
        ok = _gaps(old, new, data, begin, count, end - length, end, WIDTH)
    tl.store(sound + block, ok)
