"""LLVM intrinsics for 64 bits or 64 weights at a time, for the compiled codec of exact updates."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from peraxis_format.ops.simd import splat

# Any: numba's own annotations do not go through mypy --strict.
numba: Any = import_module("numba")
types: Any = numba.types
intrinsic: Any = import_module("numba.extending").intrinsic
ir: Any = import_module("llvmlite.ir")

__all__ = ["SELECT", "classes64", "count", "equal64", "load64", "nonzero64", "select", "trailing"]

_I1, _I8, _I64 = (ir.IntType(bits) for bits in (1, 8, 64))
_LANES: Final = 64


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def load64(context: Any, address: Any) -> Any:
    """The 8 bytes at an address, as a little-endian number."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.load(_at(builder, arguments[0], _I64), align=1)

    return types.uint64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def trailing(context: Any, value: Any) -> Any:
    """The number of zeros below the lowest 1 of a 64-bit number; 64 for 0."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(_I1, 0))

    return types.int64(types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def count(context: Any, value: Any) -> Any:
    """The number of ones of a 64-bit number."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def equal64(context: Any, address: Any, value: Any) -> Any:
    """Bit i says whether byte i of the 64 at an address equals value."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        here = builder.load(_at(builder, arguments[0], ir.VectorType(_I8, _LANES)), align=1)
        wanted = splat(builder, builder.trunc(arguments[1], _I8), _LANES)
        return builder.bitcast(builder.icmp_unsigned("==", here, wanted), _I64)

    return types.uint64(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def nonzero64(context: Any, values: Any, first: Any) -> Any:
    """Bit i says whether element first + i of an array of uint16 or uint32 is not 0."""
    word = ir.IntType(values.dtype.bitwidth)
    kind = ir.VectorType(word, _LANES)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        here = builder.load(_at(builder, arguments[1], kind), align=1)
        return builder.bitcast(builder.icmp_unsigned("!=", here, ir.Constant(kind, [0] * _LANES)), _I64)

    return types.uint64(values, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def classes64(context: Any, weights: Any, source: Any, target: Any, low: Any, shift: Any, mask: Any) -> Any:
    """min(max(exponent - low, 0), 15) of the 64 weights at address source, to 64 bytes at address target."""
    word = ir.IntType(weights.dtype.bitwidth)
    kind = ir.VectorType(word, _LANES)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        low, shift, mask = (splat(builder, builder.trunc(arguments[i], word), _LANES) for i in (3, 4, 5))
        exponent = builder.and_(builder.lshr(builder.load(_at(builder, arguments[1], kind), align=1), shift), mask)
        zero, most = (ir.Constant(kind, [value] * _LANES) for value in (0, 15))
        above = builder.select(builder.icmp_unsigned(">", exponent, low), builder.sub(exponent, low), zero)
        capped = builder.select(builder.icmp_unsigned("<", above, most), above, most)
        bytes_ = ir.VectorType(_I8, _LANES)
        builder.store(builder.trunc(capped, bytes_), _at(builder, arguments[2], bytes_), align=1)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(weights, whole, whole, whole, whole, whole), generate


def _select_table() -> NDArray[np.uint8]:
    """Entry rank << 8 | byte: the place of the 1 of that rank in the byte."""
    table = np.zeros(8 << 8, np.uint8)
    for byte in range(256):
        for rank, place in enumerate(place for place in range(8) if byte >> place & 1):
            table[rank << 8 | byte] = place
    return table


SELECT: Final = _select_table()


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator, unused-ignore]
def select(mask: Any, rank: Any, table: Any) -> Any:
    """The place of the 1 of this rank, counted from the lowest. The mask has more ones than rank. No branches."""
    x = mask - ((mask >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    x *= np.uint64(0x0101010101010101)  # byte i: the ones of bytes 0 to i
    high = np.uint64(0x8080808080808080)
    reached = ((x | high) - np.uint64(0x0101010101010101) * np.uint64(rank + 1)) & high
    place = trailing(reached) & -8  # the first byte whose sum is above rank
    before = np.int64((x << np.uint64(8)) >> np.uint64(place)) & 255
    return place + np.int64(table[(rank - before) << 8 | (np.int64(mask >> np.uint64(place)) & 255)])
