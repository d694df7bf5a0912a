"""delta_sums compiled with numba: signs and absolute sums of a pair of matrices in one pass.

The loop is limited by memory bandwidth, because it takes 32 columns at a time (a cache line of BF16, one instruction
for 16 signs), takes four rows at a time (column sums are loaded and stored once for all four), and prefetches the same
columns four rows below. Rejected: sums in binary32, which are no faster and overflow when F32 weights are squared.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from threading import Lock
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from peraxis_format.dtypes import Array, DType
from peraxis_format.ops.simd import (
    F32,
    F64,
    I32,
    LANES,
    VIEWS,
    eighths,
    load,
    over_groups,
    prefetch,
    same,
    store,
    vector,
    widen,
)
from peraxis_format.thread_pool import run_jobs

numba: Any = import_module("numba")
types: Any = numba.types
intrinsic: Any = import_module("numba.extending").intrinsic
cgutils: Any = import_module("numba.core.cgutils")
ir: Any = import_module("llvmlite.ir")

__all__ = ["pair_sums"]

_CHUNK: Final = 64  # rows whose column sums are added up separately; part of the specified order
_BLOCK_BYTES: Final = 1 << 21


def _index(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _pair_groups(
    context: Any, base_kind: Any, tuned_kind: Any, bases: Any, tuned: Any, masks: Any, weights: Any, column: Any,
    lanes: Any, first: Any, groups: Any, ahead: Any,
) -> Any:  # fmt: skip
    """`groups` times eight columns of some rows of `pair_sums`: masks, column and lanes are updated.

    bases, tuned, masks: tuples of addresses, one per row. weights, column: addresses of float64, read from group
    `first` on; weights None: ones. lanes: float64 [rows, 2, 8], of the weighted sum and of the squares. ahead: the
    distance in bytes to the rows that are read next.
    """
    kinds = base_kind.dtype, tuned_kind.dtype
    rows = len(bases)
    weighted = not isinstance(weights, types.NoneType)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        bases, tuned, masks, weights, column, lanes, first, groups, ahead = arguments[2:]
        sums = [cgutils.alloca_once(builder, vector(F64)) for _ in range(2 * rows)]
        for i, total in enumerate(sums):
            builder.store(load(builder, lanes, ir.Constant(I32, i), vector(F64)), total)

        def step(j: Any, wide: int) -> None:
            """Columns wide * j to wide * (j + 1)."""
            parts = wide // LANES
            at = [builder.add(builder.mul(j, _index(parts)), _index(k)) for k in range(parts)]
            at = [builder.add(each, first) for each in at]
            along = [load(builder, column, each, vector(F64)) for each in at]
            weight = [load(builder, weights, each, vector(F64)) for each in at] if weighted else None
            for i in range(rows):
                left, right, mask = (builder.extract_value(each, i) for each in (bases, tuned, masks))
                for stream, kind in ((left, kinds[0]), (right, kinds[1])):
                    prefetch(builder, stream, j, kind, wide, ahead)
                delta = builder.fsub(widen(builder, right, j, kinds[1], wide), widen(builder, left, j, kinds[0], wide))
                positive = builder.fcmp_ordered(">=", delta, same(F32, 0.0, wide))
                store(builder, builder.bitcast(positive, ir.IntType(wide)), mask, j)
                bits = builder.and_(builder.bitcast(delta, vector(I32, wide)), same(I32, 0x7FFFFFFF, wide))
                for k, part in enumerate(eighths(builder, builder.bitcast(bits, vector(F32, wide)))):
                    size = builder.fpext(part, vector(F64))
                    along[k] = builder.fadd(along[k], size)
                    terms = size if weight is None else builder.fmul(size, weight[k]), builder.fmul(size, size)
                    for total, term in zip(sums[2 * i : 2 * i + 2], terms, strict=True):
                        builder.store(builder.fadd(builder.load(total), term), total)
            for each, value in zip(at, along, strict=True):
                store(builder, value, column, each)

        over_groups(builder, groups, step)
        for i, total in enumerate(sums):
            store(builder, builder.load(total), lanes, ir.Constant(I32, i))
        return context.get_dummy_value()

    return types.void(base_kind, tuned_kind, bases, tuned, masks, weights, *[types.intp] * 5), generate


@numba.njit(inline="always")  # type: ignore[untyped-decorator, unused-ignore]
def _address(array: Any) -> Any:
    # Signed, because numba adds an unsigned and a signed integer to a float.
    return np.intp(array.ctypes.data)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator, unused-ignore]
def _pair_rest(base: Any, tuned: Any, weights: Any, mask: Any, column: Any, lanes: Any, i: Any, groups: Any) -> None:
    """The last columns of row i, fewer than eight, as a separate group, so that nothing outside the row is read."""
    rest = base.shape[1] - 8 * groups
    left, right = np.zeros(8, base.dtype), np.zeros(8, tuned.dtype)
    for j in range(rest):
        left[j], right[j] = base[i, 8 * groups + j], tuned[i, 8 * groups + j]
    _pair_groups(
        base, tuned, (_address(left),), (_address(right),), (_address(mask[i, groups:]),),
        weights, column.ctypes.data, lanes.ctypes.data, groups, 1, 0,
    )  # fmt: skip
    mask[i, groups] &= (1 << rest) - 1  # SPEC 5.2; 0 - 0 is not negative


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator, unused-ignore]
def _pair_rows(base: Any, tuned: Any, weights: Any, mask: Any, row: Any, squares: Any, chunks: Any) -> None:
    """Some rows of one matrix, from the first row of a chunk on.

    base, tuned: [rows, d_in]. weights: address of float64 [8 ceil(d_in/8)], or None. row, squares: float64 [rows],
    written. chunks: float64 [chunks, 8 ceil(d_in/8)], added to.
    """
    rows, width = base.shape
    groups, rest = width // 8, width % 8
    a, b, m = base.strides[0], tuned.strides[0], mask.strides[0]
    lanes = np.empty((4, 2, 8))
    for chunk in range(chunks.shape[0]):
        end = min(rows, chunk * _CHUNK + _CHUNK)
        column = chunks[chunk]
        i = chunk * _CHUNK
        while i < end:
            lanes[:] = 0.0
            x, y, z = _address(base[i:]), _address(tuned[i:]), _address(mask[i:])
            if end - i >= 4:
                # Four rows in one pass over the columns, so that column sums are loaded and stored once.
                count = 4
                _pair_groups(
                    base, tuned, (x, x + a, x + 2 * a, x + 3 * a), (y, y + b, y + 2 * b, y + 3 * b),
                    (z, z + m, z + 2 * m, z + 3 * m), weights, column.ctypes.data, lanes.ctypes.data, 0, groups, 4 * a,
                )  # fmt: skip
            else:
                count = 1
                _pair_groups(
                    base, tuned, (x,), (y,), (z,), weights, column.ctypes.data, lanes.ctypes.data, 0, groups, a,
                )  # fmt: skip
            for k in range(count):
                if rest:
                    _pair_rest(base, tuned, weights, mask, column, lanes[k], i + k, groups)
                total, square = lanes[k, 0, 0], lanes[k, 1, 0]
                for lane in range(1, 8):
                    total += lanes[k, 0, lane]
                    square += lanes[k, 1, lane]
                row[i + k], squares[i + k] = total, square
            i += count


class _InOrder:
    """Adds up [n, width] blocks row by row in the order of their indices, in whatever order they arrive."""

    def __init__(self, width: int) -> None:
        self.total = np.zeros(width)
        self._early: dict[int, NDArray[np.float64]] = {}
        self._next = 0
        self._lock = Lock()

    def add(self, index: int, block: NDArray[np.float64]) -> None:
        with self._lock:
            self._early[index] = block
            while self._next in self._early:
                for line in self._early.pop(self._next):
                    self.total += line
                self._next += 1


def pair_sums(
    base: Array,
    fine_tuned: Array,
    *,
    base_dtype: DType,
    dtype: DType,
    weights: NDArray[np.float64] | None = None,
    threads: int | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64], float]:
    """(mask, row, col, sum of d^2), in the specified order for any number of threads."""
    rows, width = base.shape
    packed = -(-width // LANES)
    mask = np.empty((rows, packed), np.uint8)
    wide = np.zeros(packed * LANES)
    wide[:width] = 0.0 if weights is None else weights
    at = None if weights is None else wide.ctypes.data
    row, squares, columns = np.empty(rows), np.empty(rows), _InOrder(packed * LANES)
    left = np.ascontiguousarray(base).view(VIEWS[base_dtype])
    right = np.ascontiguousarray(fine_tuned).view(VIEWS[dtype])
    step = _CHUNK * max(1, _BLOCK_BYTES // (_CHUNK * width * base.itemsize))

    def job(index: int) -> None:
        part = slice(index * step, min(index * step + step, rows))
        # Allocate for this block alone: the sums of all chunks would be as large as the mask, and new memory is slow.
        sums = np.zeros((-(-(part.stop - part.start) // _CHUNK), packed * LANES))
        _pair_rows(left[part], right[part], at, mask[part], row[part], squares[part], sums)
        columns.add(index, sums)

    run_jobs((partial(job, index) for index in range(-(-rows // step))), threads=threads)
    return mask, row, columns.total[:width].copy(), float(np.cumsum(squares)[-1])
