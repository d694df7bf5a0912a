"""LLVM vector operations for the compiled kernels.

One byte of a mask has eight signs, so a kernel processes a row in groups of eight lanes, four groups at a time (a cache
line of BF16), as explicit LLVM vectors. numba does not vectorise its own loops reliably (4 to 60 ms for the same
matrix). Each operation is one or two instructions:

    bytes -> <i1>      a bitcast: bit j is lane j          sign        xor of the scale's sign bit
    BF16 -> F32        zext, shl 16                         F32 -> BF16 (bits + 0x7FFF + odd) lshr 16, NaN selected
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

import numpy as np

from peraxis_format.dtypes import DType

# Any: numba's own annotations do not go through mypy --strict.
types: Any = import_module("numba").types
cgutils: Any = import_module("numba.core.cgutils")
ir: Any = import_module("llvmlite.ir")

__all__ = [
    "F32", "F64", "I1", "I32", "LANES", "VIEWS", "WIDE",
    "eighths", "load", "narrow", "over_groups", "prefetch", "same", "splat", "store", "vector", "widen",
]  # fmt: skip

LANES: Final = 8
WIDE: Final = 32
# The numba type of an array gives the dtype of its elements: numpy has no BF16, and numba no arithmetic on F16.
VIEWS: Final[dict[DType, type[np.generic]]] = {DType.BF16: np.int16, DType.F16: np.uint16, DType.F32: np.float32}
_PAGE: Final = 4096


def vector(element: Any, lanes: int = LANES) -> Any:
    return ir.VectorType(element, lanes)


F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
I1, I8, I16, I32 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32)


def same(kind: Any, value: Any, lanes: int = LANES) -> Any:
    """A vector constant with the same value in each lane."""
    return ir.Constant(vector(kind, lanes), [ir.Constant(kind, value)] * lanes)


def splat(builder: Any, scalar: Any, lanes: int = LANES) -> Any:
    kind = vector(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(vector(I32, lanes), [0] * lanes))


def eighths(builder: Any, value: Any) -> list[Any]:
    """A vector of several groups, cut into groups of eight lanes."""
    kind = value.type
    nothing = ir.Constant(kind, ir.Undefined)
    return [
        builder.shuffle_vector(value, nothing, ir.Constant(vector(I32), list(range(first, first + LANES))))
        for first in range(0, kind.count, LANES)
    ]


def place(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    """The pointer to element group `index` of size `kind` from an address."""
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


def load(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    return builder.load(place(builder, address, index, kind), align=1)


def store(builder: Any, value: Any, address: Any, index: Any) -> None:
    builder.store(value, place(builder, address, index, value.type), align=1)


def prefetch(builder: Any, address: Any, index: Any, kind: Any, lanes: int = LANES, ahead: Any = _PAGE) -> None:
    """Prefetch the bytes `ahead` of here, because hardware prefetchers stop at the end of each page (15 -> 7 ms)."""
    pointer = I8.as_pointer()
    kinds = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kinds, "llvm.prefetch.p0")
    weights = vector(I32 if kind == types.float32 else I16, lanes)
    here = builder.bitcast(place(builder, address, index, weights), pointer)
    there = builder.gep(here, [ir.Constant(index.type, ahead) if isinstance(ahead, int) else ahead])
    builder.call(function, [there, ir.Constant(I32, 0), ir.Constant(I32, 3), ir.Constant(I32, 1)])


def widen(builder: Any, address: Any, index: Any, kind: Any, lanes: int = LANES) -> Any:
    """Load weights as binary32, exactly. kind: the numba type of the array's elements. index: in units of `lanes`."""
    if kind == types.int16:
        bits = builder.zext(load(builder, address, index, vector(I16, lanes)), vector(I32, lanes))
        return builder.bitcast(builder.shl(bits, same(I32, 16, lanes)), vector(F32, lanes))
    if kind == types.uint16:
        return builder.fpext(load(builder, address, index, vector(F16, lanes)), vector(F32, lanes))
    return load(builder, address, index, vector(F32, lanes))


def narrow(builder: Any, total: Any, kind: Any) -> Any:
    """Round binary32 to nearest, ties to even; NaN becomes canonical (SPEC 6.1, 6.2)."""
    lanes = total.type.count
    nan = builder.fcmp_unordered("uno", total, total)
    bits = builder.bitcast(total, vector(I32, lanes))
    if kind == types.int16:
        odd = builder.and_(builder.lshr(bits, same(I32, 16, lanes)), same(I32, 1, lanes))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, same(I32, 0x7FFF, lanes))), same(I32, 16, lanes))
        return builder.trunc(builder.select(nan, same(I32, 0x7FC0, lanes), rounded), vector(I16, lanes))
    if kind == types.uint16:
        half = builder.bitcast(builder.fptrunc(total, vector(F16, lanes)), vector(I16, lanes))
        return builder.select(nan, same(I16, 0x7E00, lanes), half)
    return builder.select(nan, same(I32, 0x7FC00000, lanes), bits)


def over_groups(builder: Any, groups: Any, step: Callable[[Any, int], None]) -> None:
    """Emit columns 0 to 8 * groups. step(j, lanes) emits columns lanes * j to lanes * (j + 1): WIDE, then LANES."""
    wide = ir.Constant(groups.type, WIDE // LANES)
    many = builder.udiv(groups, wide)
    with cgutils.for_range(builder, many) as loop:
        step(loop.index, WIDE)
    done = builder.mul(many, wide)
    with cgutils.for_range(builder, builder.sub(groups, done)) as loop:
        step(builder.add(loop.index, done), LANES)
