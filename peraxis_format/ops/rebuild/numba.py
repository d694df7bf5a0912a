"""Rebuild weights on the CPU, compiled with numba (SPEC 6); `pair_sums` of delta_sums/numba.py is offered here too.

There is no fast-math flag, so nothing is reordered or fused: the bits are those of rebuild/numpy.py, which stays the
reference. Threads share out blocks of rows (the kernels release the GIL); no result depends on their number.

This module imports numba, which takes a second: it is imported where weights are rebuilt, never with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from peraxis_format.delta import Component
from peraxis_format.dtypes import Array, DType
from peraxis_format.ops.simd import (
    F32,
    I1,
    I32,
    LANES,
    VIEWS,
    load,
    narrow,
    over_groups,
    prefetch,
    same,
    splat,
    store,
    vector,
    widen,
)
from peraxis_format.thread_pool import run_jobs
from peraxis_tools.ops.delta_sums.numba import pair_sums

numba: Any = import_module("numba")
types: Any = numba.types
intrinsic: Any = import_module("numba.extending").intrinsic
ir: Any = import_module("llvmlite.ir")

__all__ = ["pair_sums", "rebuild", "rebuild_jobs", "rebuild_matrix", "run_jobs"]

_BLOCK_BYTES: Final = 1 << 21  # a job: large against the cost of handing it to a thread, small against a matrix


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
            scale = load(builder, builder.add(scales, scale_step), ir.Constant(I32, 0), F32)
            mask = builder.add(builder.extract_value(masks, k), offset)
            terms.append((mask, scale, builder.add(columns, column_step)))

        def step(j: Any, lanes: int) -> None:
            prefetch(builder, source, j, kinds[0], lanes)
            total = widen(builder, source, j, kinds[0], lanes)
            for mask, scale, column in terms:
                positive = builder.bitcast(load(builder, mask, j, ir.IntType(lanes)), vector(I1, lanes))
                # Exact (SPEC 6.1): two F16 have 22 bits, a power of two adds none. So no order of them matters.
                size = builder.fmul(splat(builder, scale, lanes), load(builder, column, j, vector(F32, lanes)))
                flip = builder.select(positive, same(I32, 0, lanes), same(I32, 0x80000000, lanes))
                flipped = builder.xor(builder.bitcast(size, vector(I32, lanes)), flip)
                total = builder.fadd(total, builder.bitcast(flipped, vector(F32, lanes)))
            store(builder, narrow(builder, total, kinds[1]), target, j)

        over_groups(builder, groups, step)
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
    columns = np.ones((batch, -(-width // LANES) * LANES), np.float32)
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
    flat_base = base.reshape(shape).view(VIEWS[base_dtype])
    flat_out = out.reshape(shape).view(VIEWS[dtype])
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

    masks: [d_out, ceil(d_in/8)] each. scales: [k, d_out], 2^e folded in. columns: [k, d_in]. base, out: [d_out, d_in],
    C-contiguous.
    """
    padded = np.ones((len(columns), -(-base.shape[1] // LANES) * LANES), np.float32)
    padded[:, : base.shape[1]] = columns
    views = base.view(VIEWS[dtype]), out.view(VIEWS[dtype])
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
