"""Signs and absolute sums of a pair of matrices in one pass, compiled with numba: what a fit without text needs."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from peraxis_format.dtypes import Array, DType
from peraxis_format.lanes import F32, F64, I8, I32, LANES, VIEWS, load, prefetch, same, store, vector, widen
from peraxis_format.threads import run_jobs

numba: Any = import_module("numba")
types: Any = numba.types
intrinsic: Any = import_module("numba.extending").intrinsic
cgutils: Any = import_module("numba.core.cgutils")
ir: Any = import_module("llvmlite.ir")

__all__ = ["pair_sums"]

_CHUNK: Final = 64  # rows whose column sums are added up on their own; part of the order that pair_sums states
_BLOCK_BYTES: Final = 1 << 21


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _pair_row(
    context: Any, base_kind: Any, tuned_kind: Any, base: Any, tuned: Any, weights: Any, mask: Any, column: Any,
    lanes: Any, groups: Any,
) -> Any:  # fmt: skip
    """One row of `pair_sums`: mask, column and the 16 lanes (8 of the weighted sum, 8 of the squares) are updated."""
    kinds = base_kind.dtype, tuned_kind.dtype

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        base, tuned, weights, mask, column, lanes, groups = arguments[2:]
        wide = vector(F64)
        zero, one = ir.Constant(I32, 0), ir.Constant(I32, 1)
        total, square = cgutils.alloca_once(builder, wide), cgutils.alloca_once(builder, wide)
        builder.store(load(builder, lanes, zero, wide), total)
        builder.store(load(builder, lanes, one, wide), square)
        with cgutils.for_range(builder, groups) as group:
            j = group.index
            for stream, kind in zip((base, tuned), kinds, strict=True):
                prefetch(builder, stream, j, kind)
            delta = builder.fsub(widen(builder, tuned, j, kinds[1]), widen(builder, base, j, kinds[0]))
            positive = builder.fcmp_ordered(">=", delta, same(F32, 0.0))
            store(builder, builder.bitcast(positive, I8), mask, j)
            magnitude = builder.and_(builder.bitcast(delta, vector(I32)), same(I32, 0x7FFFFFFF))
            size = builder.fpext(builder.bitcast(magnitude, vector(F32)), wide)
            store(builder, builder.fadd(load(builder, column, j, wide), size), column, j)
            weighted = builder.fmul(size, load(builder, weights, j, wide))
            builder.store(builder.fadd(builder.load(total), weighted), total)
            builder.store(builder.fadd(builder.load(square), builder.fmul(size, size)), square)
        store(builder, builder.load(total), lanes, zero)
        store(builder, builder.load(square), lanes, one)
        return context.get_dummy_value()

    return types.void(base_kind, tuned_kind, *[types.intp] * 7), generate


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator, unused-ignore]
def _pair_rows(base: Any, tuned: Any, weights: Any, mask: Any, row: Any, squares: Any, chunks: Any) -> None:
    """Rows of one matrix, from the first row of a chunk on.

    base, tuned: [rows, d_in]. weights: float64 [8 ceil(d_in/8)]. row, squares: float64 [rows], written. chunks: float64
    [chunks, 8 ceil(d_in/8)], added to.
    """
    rows, width = base.shape
    groups, rest = width // 8, width % 8
    left, right = np.zeros(8, base.dtype), np.zeros(8, tuned.dtype)
    lanes = np.empty(16)
    for chunk in range(chunks.shape[0]):
        begin, end = chunk * _CHUNK, min(rows, chunk * _CHUNK + _CHUNK)
        column = chunks[chunk]
        for i in range(begin, end):
            lanes[:] = 0.0
            _pair_row(
                base, tuned, base[i:].ctypes.data, tuned[i:].ctypes.data, weights.ctypes.data, mask[i:].ctypes.data,
                column.ctypes.data, lanes.ctypes.data, groups,
            )  # fmt: skip
            if rest:
                for j in range(rest):
                    left[j], right[j] = base[i, 8 * groups + j], tuned[i, 8 * groups + j]
                _pair_row(
                    base, tuned, left.ctypes.data, right.ctypes.data, weights[8 * groups:].ctypes.data,
                    mask[i, groups:].ctypes.data, column[8 * groups:].ctypes.data, lanes.ctypes.data, 1,
                )  # fmt: skip
                mask[i, groups] &= (1 << rest) - 1  # SPEC 5.2; 0 - 0 is not negative
            total, square = lanes[0], lanes[8]
            for lane in range(1, 8):
                total += lanes[lane]
                square += lanes[8 + lane]
            row[i], squares[i] = total, square


def pair_sums(
    base: Array,
    fine_tuned: Array,
    *,
    base_dtype: DType,
    dtype: DType,
    weights: NDArray[np.float64] | None = None,
    threads: int | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64], float]:
    """Signs of a delta and its absolute sums, in one pass over a pair of matrices.

        d = f32(fine_tuned) - f32(base);  mask: d >= 0;  row_i = sum over j of |d_ij| w_j;  col_j = sum over i of |d_ij|

    base, fine_tuned: storage arrays [d_out, d_in] of float types. weights: w [d_in], ones where None.
    Returns (mask U8 [d_out, ceil(d_in/8)], row float64 [d_out], col float64 [d_in], sum of d^2). The order of every
    sum is fixed: along a row in 8 lanes (column j in lane j mod 8), lanes then added from 0 to 7; along columns in
    chunks of 64 rows, chunks then added from 0; squares by rows, then rows from 0. Threads change no bit.
    """
    rows, width = base.shape
    padded = -(-width // LANES) * LANES
    wide = np.zeros(padded)
    wide[:width] = 1.0 if weights is None else weights
    mask = np.empty((rows, padded // LANES), np.uint8)
    row, squares, chunks = np.empty(rows), np.empty(rows), np.zeros((-(-rows // _CHUNK), padded))
    left = np.ascontiguousarray(base).view(VIEWS[base_dtype])
    right = np.ascontiguousarray(fine_tuned).view(VIEWS[dtype])

    def job(first: int) -> Callable[[], None]:
        part, mine = slice(first * _CHUNK, (first + step) * _CHUNK), slice(first, first + step)
        return lambda: _pair_rows(left[part], right[part], wide, mask[part], row[part], squares[part], chunks[mine])

    step = max(1, _BLOCK_BYTES // (_CHUNK * width * base.itemsize))
    run_jobs(map(job, range(0, len(chunks), step)), threads=threads)
    # Along the first axis numpy adds row after row, in their order.
    return mask, row, np.add.reduce(chunks, axis=0)[:width].copy(), float(np.cumsum(squares)[-1])
