"""The two hot loops on CPU, compiled with numba: rebuild a weight (SPEC 6), and take a pair's signs and sums.

Both go through a row eight columns at a time, since one byte of a mask holds eight signs. The eight lanes are written
down as LLVM vectors (numba's own loops are vectorised or not as their surroundings please; seen here: 4 to 60 ms for
the same matrix), so every operation below is one machine instruction or two, whatever the compiler's mood:

    byte -> <8 x i1>   a bitcast: bit j is lane j          sign        xor of the scale's sign bit
    BF16 -> F32        zext, shl 16                         F32 -> BF16 (bits + 0x7FFF + odd) lshr 16, NaN selected

There is no fast-math flag, so nothing is reordered or fused: the bits are those of reconstruct.py, which stays the
reference. Threads share out blocks of rows (the kernels release the GIL); no result depends on their number.

This module imports numba, which takes a second: it is imported where weights are rebuilt, never with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib import import_module
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from peraxis_format.delta import Component
from peraxis_format.dtypes import Array, DType
from peraxis_format.threads import thread_count

# Any: numba's own annotations do not go through mypy --strict.
numba: Any = import_module("numba")
types: Any = numba.types
intrinsic: Any = import_module("numba.extending").intrinsic
cgutils: Any = import_module("numba.core.cgutils")
ir: Any = import_module("llvmlite.ir")

__all__ = ["pair_sums", "rebuild", "rebuild_jobs", "rebuild_matrix", "run_jobs"]

_LANES: Final = 8
_CHUNK: Final = 64  # rows whose column sums are added up on their own; part of the order that pair_sums states
_PAGE: Final = 4096
_BLOCK_BYTES: Final = 1 << 21  # a job: large against the cost of handing it to a thread, small against a matrix

# The numba type of an array says what its elements are: numpy has no BF16, and numba no arithmetic on F16.
_VIEWS: Final[dict[DType, type[np.generic]]] = {DType.BF16: np.int16, DType.F16: np.uint16, DType.F32: np.float32}


# --- pieces of LLVM ------------------------------------------------------------------------------------


def _vector(element: Any) -> Any:
    return ir.VectorType(element, _LANES)


_F16, _F32, _F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_I1, _I8, _I16, _I32 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32)


def _same(kind: Any, value: Any) -> Any:
    """A vector constant with the same value in each lane."""
    return ir.Constant(_vector(kind), [ir.Constant(kind, value)] * _LANES)


def _splat(builder: Any, scalar: Any) -> Any:
    kind = _vector(scalar.type)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(_vector(_I32), [0] * _LANES))


def _place(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    """The pointer to element group `index` of size `kind` from an address."""
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


def _load(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    return builder.load(_place(builder, address, index, kind), align=1)


def _store(builder: Any, value: Any, address: Any, index: Any) -> None:
    builder.store(value, _place(builder, address, index, value.type), align=1)


def _prefetch(builder: Any, address: Any, index: Any, kind: Any) -> None:
    """Ask for what lies a page further on: hardware prefetchers stop at the end of each page (seen: 15 -> 7 ms)."""
    pointer = _I8.as_pointer()
    kinds = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kinds, "llvm.prefetch.p0")
    here = builder.bitcast(_place(builder, address, index, _vector(_I32 if kind == types.float32 else _I16)), pointer)
    there = builder.gep(here, [ir.Constant(index.type, _PAGE)])
    builder.call(function, [there, ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)])


def _widen(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    """Load eight weights as binary32, exactly. kind: the numba type of the array's elements."""
    if kind == types.int16:
        bits = builder.zext(_load(builder, address, index, _vector(_I16)), _vector(_I32))
        return builder.bitcast(builder.shl(bits, _same(_I32, 16)), _vector(_F32))
    if kind == types.uint16:
        return builder.fpext(_load(builder, address, index, _vector(_F16)), _vector(_F32))
    return _load(builder, address, index, _vector(_F32))


def _narrow(builder: Any, total: Any, kind: Any) -> Any:
    """Round eight binary32 to nearest, ties to even; NaN becomes canonical (SPEC 6.1, 6.2)."""
    nan = builder.fcmp_unordered("uno", total, total)
    bits = builder.bitcast(total, _vector(_I32))
    if kind == types.int16:
        odd = builder.and_(builder.lshr(bits, _same(_I32, 16)), _same(_I32, 1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, _same(_I32, 0x7FFF))), _same(_I32, 16))
        return builder.trunc(builder.select(nan, _same(_I32, 0x7FC0), rounded), _vector(_I16))
    if kind == types.uint16:
        half = builder.bitcast(builder.fptrunc(total, _vector(_F16)), _vector(_I16))
        return builder.select(nan, _same(_I16, 0x7E00), half)
    return builder.select(nan, _same(_I32, 0x7FC00000), bits)


# --- rebuild -------------------------------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _rebuild_row(
    context: Any, base_kind: Any, out_kind: Any, source: Any, target: Any, masks: Any, offset: Any,
    scales: Any, columns: Any, steps: Any, groups: Any,
) -> Any:  # fmt: skip
    """out = round(base + sum over k of sign_k * (scale_k * column_k)) for `groups` times eight columns of one row.

    base_kind, out_kind: arrays whose element type says the dtype. masks: a tuple of addresses, one a component, so that
    the loop over components is unrolled; offset: bytes, added to each. steps: bytes from one component's scale, and
    column, to the next one's. The rest: addresses and a count.
    """
    kinds = base_kind.dtype, out_kind.dtype
    components = len(masks)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        source, target, masks, offset, scales, columns, steps, groups = arguments[2:]
        terms = []
        for k in range(components):
            scale_step, column_step = (
                builder.mul(builder.extract_value(steps, i), ir.Constant(offset.type, k)) for i in range(2)
            )
            scale = _load(builder, builder.add(scales, scale_step), ir.Constant(_I32, 0), _F32)
            mask = builder.add(builder.extract_value(masks, k), offset)
            terms.append((mask, _splat(builder, scale), builder.add(columns, column_step)))
        with cgutils.for_range(builder, groups) as group:
            _prefetch(builder, source, group.index, kinds[0])
            total = _widen(builder, source, group.index, kinds[0])
            for mask, scale, column in terms:
                positive = builder.bitcast(_load(builder, mask, group.index, _I8), _vector(_I1))
                # Exact (SPEC 6.1): two F16 have 22 bits, a power of two adds none. So no order of them matters.
                size = builder.fmul(scale, _load(builder, column, group.index, _vector(_F32)))
                flip = builder.select(positive, _same(_I32, 0), _same(_I32, 0x80000000))
                term = builder.bitcast(builder.xor(builder.bitcast(size, _vector(_I32)), flip), _vector(_F32))
                total = builder.fadd(total, term)
            _store(builder, _narrow(builder, total, kinds[1]), target, group.index)
        return context.get_dummy_value()

    address, pair = types.intp, types.UniTuple(types.intp, 2)
    return (
        types.void(base_kind, out_kind, address, address, masks, address, address, address, pair, address),
        generate,
    )


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator, unused-ignore]
def _rebuild_rows(base: Any, out: Any, masks: Any, mask_step: Any, scales: Any, columns: Any) -> None:
    """Rows of one matrix.

    base, out: [rows, d_in]. masks: addresses of the first row of each mask, whose rows are mask_step bytes apart.
    scales: float32 [k, rows]. columns: float32 [k, 8 ceil(d_in/8)].
    """
    rows, width = base.shape
    groups, rest = width // 8, width % 8
    steps = (scales.strides[0], columns.strides[0])
    source, target = np.zeros(8, base.dtype), np.zeros(8, out.dtype)
    for i in range(rows):
        scale = scales[0, i:].ctypes.data
        _rebuild_row(
            base, out, base[i:].ctypes.data, out[i:].ctypes.data, masks, i * mask_step,
            scale, columns.ctypes.data, steps, groups,
        )  # fmt: skip
        if rest:
            # The last columns go through a group of their own: nothing outside the row is read or written.
            for j in range(rest):
                source[j] = base[i, 8 * groups + j]
            _rebuild_row(
                base, out, source.ctypes.data, target.ctypes.data, masks, i * mask_step + groups,
                scale, columns[0, 8 * groups:].ctypes.data, steps, 1,
            )  # fmt: skip
            for j in range(rest):
                out[i, 8 * groups + j] = target[j]


def _scale_matrix(component: Component, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """row_i * 2^e (SPEC 5.3), or the scalar, or 2^e alone: float32 [batch, d_out]."""
    factor = np.float32(2.0**component.exponent)
    scales = np.full(shape[:2], factor, np.float32)
    if component.row is not None:
        scales *= component.row.reshape(shape[:2]).astype(np.float32)
    if component.scalar is not None:
        scales *= component.scalar.astype(np.float32)
    return scales


def _column_matrix(component: Component, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """col_j, or ones: float32 [batch, d_in up to a multiple of 8]."""
    batch, _, width = shape
    columns = np.ones((batch, -(-width // _LANES) * _LANES), np.float32)
    if component.col is not None:
        columns[:, :width] = component.col.reshape(batch, width)
    return columns


def rebuild_jobs(
    components: Sequence[Component], base: Array, out: Array, *, base_dtype: DType, dtype: DType
) -> Iterator[Callable[[], None]]:
    """The work of `rebuild` as calls that may run in any order on any threads, each for a block of rows.

    components: 1 to 8, covering [..., d_out, d_in]. base, out: C-contiguous storage arrays of that shape; they may be
    the same array, and otherwise must not overlap. Nothing is written before a call runs.
    """
    d_out, d_in = base.shape[-2:]
    shape = (base.size // (d_out * d_in), d_out, d_in)
    flat_base = base.reshape(shape).view(_VIEWS[base_dtype])
    flat_out = out.reshape(shape).view(_VIEWS[dtype])
    masks = [np.ascontiguousarray(component.mask).reshape(shape[0], d_out, -1) for component in components]
    scales = np.stack([_scale_matrix(component, shape) for component in components])
    columns = np.stack([_column_matrix(component, shape) for component in components])
    for e in range(shape[0]):
        part = [mask[e] for mask in masks]
        yield from _jobs(flat_base[e], flat_out[e], part, scales[:, e], columns[:, e])


def rebuild_matrix(
    masks: Sequence[NDArray[np.uint8]],
    scales: NDArray[np.float32],
    columns: NDArray[np.float32],
    base: Array,
    out: Array,
    *,
    dtype: DType,
    threads: int | None = None,
) -> None:
    """`rebuild` of one matrix from components that are in binary32 already: the term is sign * (scales * columns).

    masks: [d_out, ceil(d_in/8)] each. scales: [k, d_out], 2^e folded in. columns: [k, d_in]. base, out: [d_out, d_in].
    """
    padded = np.ones((len(columns), -(-base.shape[1] // _LANES) * _LANES), np.float32)
    padded[:, : base.shape[1]] = columns
    views = base.view(_VIEWS[dtype]), out.view(_VIEWS[dtype])
    run_jobs(_jobs(*views, [np.ascontiguousarray(mask) for mask in masks], scales, padded), threads=threads)


def _jobs(
    base: Array, out: Array, masks: Sequence[Array], scales: Array, columns: Array
) -> Iterator[Callable[[], None]]:
    """Blocks of rows of one matrix."""
    rows, width = base.shape
    columns = np.ascontiguousarray(columns)
    step = max(1, _BLOCK_BYTES // (width * base.itemsize))
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        yield _job(
            base[part], out[part], [mask[part] for mask in masks], np.ascontiguousarray(scales[:, part]), columns
        )


def _job(base: Array, out: Array, masks: Sequence[Array], scales: Array, columns: Array) -> Callable[[], None]:
    def job() -> None:
        # `masks` is held by this call, so its addresses stay good.
        addresses = tuple(mask.ctypes.data for mask in masks)
        _rebuild_rows(base, out, addresses, masks[0].strides[0], scales, columns)

    return job


def rebuild(
    components: Sequence[Component],
    base: Array,
    out: Array,
    *,
    base_dtype: DType,
    dtype: DType,
    threads: int | None = None,
) -> None:
    """out = base + components, bit for bit as `reconstruct` computes it. Arguments: see rebuild_jobs."""
    run_jobs(rebuild_jobs(components, base, out, base_dtype=base_dtype, dtype=dtype), threads=threads)


# --- pair sums -----------------------------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _pair_row(
    context: Any, base_kind: Any, tuned_kind: Any, base: Any, tuned: Any, weights: Any, mask: Any, column: Any,
    lanes: Any, groups: Any,
) -> Any:  # fmt: skip
    """One row of `pair_sums`: mask, column and the 16 lanes (8 of the weighted sum, 8 of the squares) are updated."""
    kinds = base_kind.dtype, tuned_kind.dtype

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        base, tuned, weights, mask, column, lanes, groups = arguments[2:]
        wide = _vector(_F64)
        zero, one = ir.Constant(_I32, 0), ir.Constant(_I32, 1)
        total, square = cgutils.alloca_once(builder, wide), cgutils.alloca_once(builder, wide)
        builder.store(_load(builder, lanes, zero, wide), total)
        builder.store(_load(builder, lanes, one, wide), square)
        with cgutils.for_range(builder, groups) as group:
            j = group.index
            for stream, kind in zip((base, tuned), kinds, strict=True):
                _prefetch(builder, stream, j, kind)
            delta = builder.fsub(_widen(builder, tuned, j, kinds[1]), _widen(builder, base, j, kinds[0]))
            positive = builder.fcmp_ordered(">=", delta, _same(_F32, 0.0))
            _store(builder, builder.bitcast(positive, _I8), mask, j)
            magnitude = builder.and_(builder.bitcast(delta, _vector(_I32)), _same(_I32, 0x7FFFFFFF))
            size = builder.fpext(builder.bitcast(magnitude, _vector(_F32)), wide)
            _store(builder, builder.fadd(_load(builder, column, j, wide), size), column, j)
            weighted = builder.fmul(size, _load(builder, weights, j, wide))
            builder.store(builder.fadd(builder.load(total), weighted), total)
            builder.store(builder.fadd(builder.load(square), builder.fmul(size, size)), square)
        _store(builder, builder.load(total), lanes, zero)
        _store(builder, builder.load(square), lanes, one)
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
    padded = -(-width // _LANES) * _LANES
    wide = np.zeros(padded)
    wide[:width] = 1.0 if weights is None else weights
    mask = np.empty((rows, padded // _LANES), np.uint8)
    row, squares, chunks = np.empty(rows), np.empty(rows), np.zeros((-(-rows // _CHUNK), padded))
    left = np.ascontiguousarray(base).view(_VIEWS[base_dtype])
    right = np.ascontiguousarray(fine_tuned).view(_VIEWS[dtype])

    def job(first: int) -> Callable[[], None]:
        part, mine = slice(first * _CHUNK, (first + step) * _CHUNK), slice(first, first + step)
        return lambda: _pair_rows(left[part], right[part], wide, mask[part], row[part], squares[part], chunks[mine])

    step = max(1, _BLOCK_BYTES // (_CHUNK * width * base.itemsize))
    run_jobs(map(job, range(0, len(chunks), step)), threads=threads)
    for chunk in chunks[1:]:
        chunks[0] += chunk
    return mask, row, chunks[0, :width].copy(), float(np.cumsum(squares)[-1])


# --- threads -------------------------------------------------------------------------------------------


def run_jobs(jobs: Iterator[Callable[[], None]], *, threads: int | None = None) -> None:
    """Run jobs on `threads` threads (default: all processors). Raises what a job raises first.

    When this returns or raises, no job is running any more.
    """
    listed = list(jobs)
    count = min(threads or thread_count(), len(listed))
    if count <= 1:
        for job in listed:
            job()
    else:
        with ThreadPoolExecutor(count) as pool:
            _wait([pool.submit(job) for job in listed])


def _wait(futures: Sequence[Future[None]]) -> None:
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
