"""Exact updates in numpy: the reference of SPEC 5.6 to 5.9 and of the writer's choices (SPEC 11.3).

block     a little-endian number of bits: unary numbers from the lowest bit up, fields from the highest down
ordinal   u XOR (all ones if its sign is set, else the sign bit): patterns in the order of their values
step      ordinal of the new pattern minus that of the old one, modulo the number of patterns, zigzag
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from peraxis_format.ops.exact.kinds import RAW, FloatKind

__all__ = ["LayoutError", "check_gaps", "check_keyed", "decode_block", "encode_block"]

_ESCAPE: Final = 8  # ones of a unary number of class 0 whose field is a whole pattern
_CLASSES: Final = 15
_MASS: Final = 15  # bits of the field before the next moving weight
_WIDE: Final = 384  # if fewer than one in this many weights moves, gaps have two bytes

Words = NDArray[np.int64]


class LayoutError(ValueError):
    """The lengths of the parts of a block of gaps do not match its counts (SPEC 5.8)."""


def _ordinal(patterns: Words, kind: FloatKind) -> Words:
    top = 1 << (kind.width - 1)
    return patterns ^ np.where(patterns & top, 2 * top - 1, top)


def _pattern(ordinals: Words, kind: FloatKind) -> Words:
    top = 1 << (kind.width - 1)
    return ordinals ^ np.where(ordinals & top, top, 2 * top - 1)


def _steps(old: Words, new: Words, kind: FloatKind) -> Words:
    """The zigzag step from each old pattern to the new one."""
    d = (_ordinal(new, kind) - _ordinal(old, kind)) & ((1 << kind.width) - 1)
    d -= (d >> (kind.width - 1)) << kind.width
    return np.where(d < 0, -2 * d - 1, 2 * d)


def _moved(old: Words, z: Words, kind: FloatKind) -> Words:
    d = np.where(z & 1, -(z + 1) // 2, z // 2)
    return _pattern((_ordinal(old, kind) + d) & ((1 << kind.width) - 1), kind)


def _classes(old: Words, mode: int, kind: FloatKind) -> tuple[Words, Words]:
    """The class of each weight, and k of class 0."""
    e = (old >> kind.mantissa) & kind.mask
    return np.clip(e - mode + 1, 0, _CLASSES), np.minimum(mode - 1 - e, kind.mantissa + 1)


# --- decoding -----------------------------------------------------------------------------------------


class _Bits:
    """The bits of a block. Unary numbers end at its zeros, in order; `high` is the bit above the next field."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.bits = np.unpackbits(data, bitorder="little")
        self.high = self.bits.size
        self._zeros = np.flatnonzero(self.bits == 0)
        self._taken = 0

    @property
    def low(self) -> int:
        """The bit above the last unary number."""
        return int(self._zeros[self._taken - 1]) + 1 if self._taken else 0

    def unaries(self, count: int) -> Words:
        """The next unary numbers. Raises ValueError if there are fewer."""
        ends = self._zeros[self._taken : self._taken + count]
        if ends.size < count:
            raise ValueError
        starts = np.concatenate(([self.low], ends[:-1] + 1))
        self._taken += count
        return np.asarray((ends - starts)[:count], np.int64)

    def fields(self, widths: Words) -> Words:
        """The next fields. Raises ValueError if they would reach into the unary numbers."""
        ends = self.high - np.cumsum(widths)
        if ends.size and int(ends[-1]) < self.low:
            raise ValueError
        values = np.zeros(widths.size, np.int64)
        for bit in range(int(widths.max(initial=0))):
            there = widths > bit
            values[there] |= self.bits[ends[there] + bit].astype(np.int64) << bit
        self.high = int(ends[-1]) if ends.size else self.high
        return values

    def ahead(self) -> int:
        """The next field of 15 bits, without taking it; bits below the block's first are zero."""
        part = self.bits[max(self.high - _MASS, 0) : self.high]
        return int(part.astype(np.int64) @ (1 << np.arange(_MASS - part.size, _MASS))) if part.size else 0


def decode_block(old: Words, mode: int, data: NDArray[np.uint8], kind: FloatKind) -> Words:
    """The new patterns of a block. Raises ValueError if its bytes are malformed (SPEC 5.8, 5.9)."""
    if mode == RAW:
        if data.size != old.size * kind.width // 8:
            raise ValueError
        return np.asarray(data.view(f"<u{kind.width // 8}"), np.int64)
    if not data.size:
        return old.copy()
    return _keyed(old, mode, _Bits(data), kind) if mode else _gaps(old, data, kind)


def _exceptions(bits: _Bits, size: int, kind: FloatKind) -> tuple[Words, Words]:
    count = int(bits.unaries(1)[0])
    fields = bits.fields(np.tile([16, kind.width], count))
    _check_places(fields[::2], size)
    return fields[::2], fields[1::2]


def _check_places(places: Words, size: int) -> None:
    if places.size and (np.any(np.diff(places) <= 0) or int(places[-1]) >= size):
        raise ValueError


def _keyed(old: Words, mode: int, bits: _Bits, kind: FloatKind) -> Words:
    new = old.copy()
    places, patterns = _exceptions(bits, old.size, kind)
    classes, k = _classes(old, mode, kind)
    dense = np.flatnonzero(classes == 0)
    q = bits.unaries(dense.size)
    if np.any(q > _ESCAPE):
        raise ValueError
    fields = bits.fields(np.where(q == _ESCAPE, kind.width, k[dense]))
    new[dense] = np.where(q == _ESCAPE, fields, _moved(old[dense], (q << k[dense]) | fields, kind))
    run = (int(bits.unaries(1)[0]) << _MASS) | bits.ahead()
    for c in range(1, _CLASSES + 1):
        members, at = np.flatnonzero(classes == c), 0
        while (gap := run >> (_MASS - c)) < members.size - at:
            at += gap + 1
            down = int(bits.fields(np.array([c + 1]))[0]) & 1
            place = members[at - 1 : at]
            new[place] = _moved(old[place], np.array([1 if down else 2]), kind)
            run = (int(bits.unaries(1)[0]) << _MASS) | bits.ahead()
        run -= (members.size - at) << (_MASS - c)
    rest = bits.bits[bits.low : bits.high]
    # The last run reaches beyond the last weight, but not further than necessary.
    short = not 0 <= run - bits.ahead() < 1 << _MASS
    if short or bits.low > bits.high or rest.size >= 8 or rest.any():
        raise ValueError
    new[places] = patterns
    return new


def _gap_parts(data: NDArray[np.uint8], size: int, kind: FloatKind) -> tuple[Words, Words, Words, Words]:
    """Places of moves, whether each is down, places and patterns of exceptions. Raises ValueError, LayoutError."""
    if data.size < 4:
        raise ValueError
    moves, exceptions = (int(part) for part in data[:4].view("<u2"))
    if moves > size:
        raise LayoutError
    listed = 4 + 2 * exceptions
    signs = listed + exceptions * kind.width // 8
    gaps = signs + (moves + 7) // 8
    down = np.unpackbits(data[signs:gaps], bitorder="little")
    if gaps > data.size or down[moves:].any():
        raise LayoutError
    rest = data[gaps:]
    if moves * _WIDE < size:
        if rest.size != 2 * moves:
            raise LayoutError
        steps_ = np.asarray(rest.view("<u2"), np.int64)
    else:
        ends = np.flatnonzero(rest != 255)
        if ends.size != moves or (int(ends[-1]) + 1 if moves else 0) != rest.size:
            raise LayoutError
        steps_ = np.diff(np.concatenate(([0], np.cumsum(rest, dtype=np.int64)[ends])))
    moved = np.cumsum(steps_ + 1) - 1
    places = np.asarray(data[4:listed].view("<u2"), np.int64)
    _check_places(places, size)
    _check_places(moved, size)
    if np.intersect1d(moved, places).size:
        raise ValueError
    patterns = np.asarray(data[listed:signs].view(f"<u{kind.width // 8}"), np.int64)
    return moved, down[:moves].astype(np.int64), places, patterns


def _gaps(old: Words, data: NDArray[np.uint8], kind: FloatKind) -> Words:
    moved, down, places, patterns = _gap_parts(data, old.size, kind)
    new = old.copy()
    new[moved] = _moved(old[moved], 2 - down, kind)
    new[places] = patterns
    return new


def check_gaps(data: NDArray[np.uint8], size: int, kind: FloatKind) -> None:
    """The checks of a block of gaps that need no base. Raises ValueError; LayoutError if SPEC 5.8 is violated."""
    _gap_parts(data, size, kind)


def check_keyed(data: NDArray[np.uint8], size: int, kind: FloatKind) -> None:
    """The checks of a keyed block that need no base: those of its exceptions. Raises ValueError."""
    partial = np.flatnonzero(data != 255)
    if not partial.size:
        raise ValueError
    last = int(data[partial[0]])
    count = 8 * int(partial[0]) + ((last + 1) & ~last).bit_length() - 1  # ones below the lowest 0
    each = 2 + kind.width // 8
    if 8 * each * count + count + 1 > 8 * data.size:
        raise ValueError
    # From the top down: two bytes of place, then the pattern.
    listed = data[data.size - each * count :].reshape(count, each)[::-1]
    _check_places(listed[:, -2].astype(np.int64) | listed[:, -1].astype(np.int64) << 8, size)


# --- encoding -----------------------------------------------------------------------------------------


def _choose(old: Words, z: Words, kind: FloatKind) -> int:
    """The mode from 1 to 254 of least cost by SPEC 11.3; of equals the highest."""
    e = (old >> kind.mantissa) & kind.mask
    members = np.bincount(e, minlength=256)
    ones = np.bincount(e[(z > 0) & (z <= 2)], minlength=256)
    big = np.bincount(e[z > 2], minlength=256)
    length = np.frexp(z.astype(np.float64))[1].astype(np.int64)
    typical = (3 << length) >> 2
    present = np.flatnonzero(members)
    best, choice = 1 << 62, 1
    for mode in range(max(int(present[0]) - 15, 1), min(int(present[-1]) + kind.mantissa + 2, 254) + 1):
        k = np.minimum(mode - 1 - e, kind.mantissa + 1)
        dense = k >= 0
        unary = typical[dense] >> k[dense]
        moving = z[dense] > 0
        cost = int((k[dense] + 1).sum())
        cost += int(np.where(unary < _ESCAPE, unary, _ESCAPE + kind.width - k[dense])[moving].sum())
        sparse = present[present >= mode]
        c = np.minimum(sparse - mode + 1, _CLASSES)
        cost += int((ones[sparse] * (c + 2) + big[sparse] * (17 + kind.width)).sum())
        cost += int(((members[sparse] - ones[sparse]) << (_MASS - c)).sum()) >> _MASS
        if cost <= best:
            best, choice = cost, mode
    return choice


def encode_block(old: Words, new: Words, kind: FloatKind, *, keyed: bool) -> tuple[int, bytes]:
    """Mode and bytes of a block by the writer's choice (SPEC 11.3). keyed: whether keyed blocks are allowed."""
    z = _steps(old, new, kind)
    if not z.any():
        return 0, b""
    raw = new.astype(f"<u{kind.width // 8}").tobytes()
    gaps = _write_gaps(new, z, kind)
    if not keyed:
        return (0, gaps) if gaps is not None and len(gaps) <= len(raw) * 3 // 4 else (RAW, raw)
    mode = _choose(old, z, kind)
    best = mode, _write_keyed(old, new, z, mode, kind)
    if gaps is not None and len(gaps) < min(len(best[1]), len(raw)):
        return 0, gaps
    return best if len(best[1]) < len(raw) else (RAW, raw)


def _write_keyed(old: Words, new: Words, z: Words, mode: int, kind: FloatKind) -> bytes:
    classes, k = _classes(old, mode, kind)
    far = np.flatnonzero((classes > 0) & (z > 2))
    dense = np.flatnonzero(classes == 0)
    k = k[dense]
    q = np.minimum(z[dense] >> k, _ESCAPE)
    unary = [far.size, *q.tolist()]
    fields: list[tuple[int, int]] = []
    for i in far.tolist():
        fields += [(i, 16), (int(new[i]), kind.width)]
    values = np.where(q == _ESCAPE, new[dense], z[dense] & ((1 << k) - 1))
    fields += zip(values.tolist(), np.where(q == _ESCAPE, kind.width, k).tolist(), strict=True)
    run = 0
    for c in range(1, _CLASSES + 1):
        members = np.flatnonzero(classes == c)
        at = 0
        for rank in np.flatnonzero((z[members] > 0) & (z[members] <= 2)).tolist():
            run += (rank - at) << (_MASS - c)
            at = rank + 1
            unary.append(run >> _MASS)
            low = (run & ((1 << _MASS) - 1)) >> (_MASS - c)
            fields.append((low << 1 | (int(z[members[rank]]) & 1), c + 1))
            run = 0
        run += (members.size - at) << (_MASS - c)
    unary.append(-(-run >> _MASS))
    return _packed(unary, fields)


def _packed(unary: Iterable[int], fields: Iterable[tuple[int, int]]) -> bytes:
    ends = np.cumsum(np.asarray(list(unary), np.int64) + 1)
    low = np.ones(int(ends[-1]), np.uint8)
    low[ends - 1] = 0
    high = "".join(format(value, f"0{width}b") for value, width in fields if width)
    size = -(-(low.size + len(high)) // 8) * 8
    bits = np.zeros(size, np.uint8)
    bits[: low.size] = low
    bits[size - len(high) :] = np.frombuffer(high[::-1].encode(), np.uint8) - ord("0")
    return np.packbits(bits, bitorder="little").tobytes()


def _write_gaps(new: Words, z: Words, kind: FloatKind) -> bytes | None:
    """The bytes of a block of gaps; None if it has more moves or exceptions than its counts can represent."""
    moved, far = np.flatnonzero((z > 0) & (z <= 2)), np.flatnonzero(z > 2)
    if max(moved.size, far.size) > 65535:
        return None
    gaps: Any = np.diff(moved, prepend=-1) - 1
    if moved.size * _WIDE < z.size:
        rest = gaps.astype("<u2").tobytes()
    else:
        rest = b"".join(b"\xff" * (gap // 255) + bytes([gap % 255]) for gap in gaps.tolist())
    parts: list[Any] = [
        np.array([moved.size, far.size], "<u2"),
        far.astype("<u2"),
        new[far].astype(f"<u{kind.width // 8}"),
        np.packbits((z[moved] & 1).astype(np.uint8), bitorder="little"),
    ]
    return b"".join([*(part.tobytes() for part in parts), rest])
