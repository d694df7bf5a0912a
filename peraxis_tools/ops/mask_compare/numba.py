"""mask_compare compiled with numba; the loops release the GIL."""

# mypy: allow-untyped-decorators
# numba has no type information.

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from peraxis_tools.ops.mask_compare import Columns, Counts, Mask, Sums

numba: Any = import_module("numba")
types: Any = numba.types
intrinsic: Any = import_module("numba.extending").intrinsic
cgutils: Any = import_module("numba.core.cgutils")
ir: Any = import_module("llvmlite.ir")

__all__ = ["differing"]

_LANES: Final = 16
_WORDS: Final = 64  # words of 64 columns between two sums in binary64

_F32, _F64, _I1, _I16, _I32, _I64 = ir.FloatType(), ir.DoubleType(), *map(ir.IntType, (1, 16, 32, 64))
_SINGLE, _DOUBLE = ir.VectorType(_F32, _LANES), ir.VectorType(_F64, _LANES)


@intrinsic
def _bits(context: Any, word: Any) -> Any:
    """The number of bits of a 64-bit word that are 1."""
    return types.uint64(types.uint64), lambda context, builder, _, arguments: builder.ctpop(arguments[0])


@intrinsic
def _weigh(context: Any, a: Any, b: Any, weights: Any, words: Any) -> Any:
    """The sum of the weights where words at the addresses a and b differ; binary32 in 64 lanes, then binary64."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        a, b, weights, words = arguments
        zero = ir.Constant(_SINGLE, [ir.Constant(_F32, 0.0)] * _LANES)
        left, right = (builder.inttoptr(address, _I64.as_pointer()) for address in (a, b))
        column = builder.inttoptr(weights, _SINGLE.as_pointer())
        # One sum for each quarter of a word: four independent chains of additions.
        sums = [cgutils.alloca_once(builder, _SINGLE) for _ in range(4)]
        for place in sums:
            builder.store(zero, place)
        with cgutils.for_range(builder, words) as word:
            i = word.index
            loaded = [builder.load(builder.gep(pointer, [i]), align=8) for pointer in (left, right)]
            quarters = builder.bitcast(builder.xor(*loaded), ir.VectorType(_I16, 4))
            for k, place in enumerate(sums):
                # Bitcast: bit j of the quarter is lane j.
                differs = builder.bitcast(
                    builder.extract_element(quarters, ir.Constant(_I32, k)), ir.VectorType(_I1, _LANES)
                )
                j = builder.add(builder.mul(i, ir.Constant(i.type, 4)), ir.Constant(i.type, k))
                chosen = builder.select(differs, builder.load(builder.gep(column, [j]), align=4), zero)
                builder.store(builder.fadd(builder.load(place), chosen), place)
        total = builder.fpext(builder.load(sums[0]), _DOUBLE)
        for place in sums[1:]:
            total = builder.fadd(total, builder.fpext(builder.load(place), _DOUBLE))
        kind = ir.FunctionType(_F64, [_F64, _DOUBLE])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{_LANES}f64")
        return builder.call(reduce, [ir.Constant(_F64, 0.0), total])

    return types.float64(*[types.intp] * 4), generate


@numba.njit(nogil=True, cache=True)
def _count_loop(a: Any, b: Any, counts: Any) -> None:
    """counts[i]: the number of bits that differ in row i. a, b: uint64 [rows, words]. counts: int64 [rows], written."""
    for i in range(a.shape[0]):
        total = np.uint64(0)
        for c in range(a.shape[1]):
            total += _bits(a[i, c] ^ b[i, c])
        counts[i] = total


@numba.njit(nogil=True, cache=True)
def _add_loop(a: Any, b: Any, weights: Any, counts: Any, sums: Any) -> None:
    """Like _count_loop, and sums[i]: the weights that differ. weights: binary32 [64 words]. sums: binary64 [rows]."""
    rows, words = a.shape
    _count_loop(a, b, counts)
    for i in range(rows):
        total = 0.0
        for begin in range(0, words, _WORDS):
            count = min(_WORDS, words - begin)
            first = 8 * (i * words + begin)
            total += _weigh(a.ctypes.data + first, b.ctypes.data + first, weights.ctypes.data + 256 * begin, count)
        sums[i] = total


def differing(a: Mask, b: Mask, columns: Columns | None) -> tuple[Counts, Sums]:
    """See mask_compare.differing."""
    counts, sums = np.empty(a.shape[0], np.int64), np.empty(a.shape[0])
    left, right = _words(a), _words(b)
    if columns is None:
        _count_loop(left, right, counts)
        return counts, counts.astype(np.float64)
    _add_loop(left, right, columns.padded, counts, sums)
    return counts, sums


def _words(mask: Mask) -> NDArray[np.uint64]:
    """A mask as 64-bit words, each row padded with zeros; a view if possible."""
    rows, width = mask.shape
    if width % 8 or mask.ctypes.data % 8:
        padded = np.zeros((rows, width + -width % 8), np.uint8)
        padded[:, :width] = mask
        mask = padded
    return np.ascontiguousarray(mask).view(np.uint64)
