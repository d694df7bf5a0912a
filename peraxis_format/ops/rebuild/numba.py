"""Rebuild weights on the CPU, compiled with numba (SPEC 6).

There is no fast-math flag, so nothing is reordered or fused: the bits are those of rebuild/numpy.py, the reference.
Threads process blocks of rows (the kernels release the GIL); no result depends on their number.

This module imports numba, which takes a second, so it is imported when weights are rebuilt, not with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, Final

import numpy as np

from peraxis_format.delta import ComponentFactors
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

numba: Any = import_module("numba")
types: Any = numba.types
intrinsic: Any = import_module("numba.extending").intrinsic
ir: Any = import_module("llvmlite.ir")

__all__ = ["compile_for", "rebuild", "rebuild_jobs"]

_BLOCK_BYTES: Final = 1 << 21  # of a job: large compared with the overhead of a thread, small compared with a matrix


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _rebuild_row(
    context: Any, base_kind: Any, out_kind: Any, source: Any, target: Any, masks: Any, offset: Any,
    scales: Any, columns: Any, steps: Any, groups: Any,
) -> Any:  # fmt: skip
    """out = round(base + sum over k of sign_k * (scale_k * column_k)) for `groups` times eight columns of one row.

    base_kind, out_kind: arrays whose element type gives the dtype. masks: a tuple of addresses, one per component, so
    that the loop over components is unrolled; offset: bytes, added to each. steps: bytes from one component's scale,
    and column, to the next one's. The others are addresses and a count.
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
                # Exact (SPEC 6.1): two F16 have 22 bits, and a power of two adds none. So their order does not matter.
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
    """Rebuild some rows of one matrix.

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
            # The last columns are a separate group, so that nothing outside the row is read or written.
            for j in range(rest):
                source[j] = base[i, 8 * groups + j]
            _rebuild_row(
                base, out, source.ctypes.data, target.ctypes.data, masks, i * mask_step + groups,
                scale, columns[0, 8 * groups:].ctypes.data, steps, 1,
            )  # fmt: skip
            for j in range(rest):
                out[i, 8 * groups + j] = target[j]


def rebuild_jobs(
    matrices: Sequence[Sequence[ComponentFactors]], base: Array, out: Array, *, base_dtype: DType, dtype: DType
) -> Iterator[Callable[[], None]]:
    """The work of `rebuild` as jobs that may run in any order on any threads, each for a block of rows.

    The arguments are those of `rebuild`; out is C-contiguous. Nothing is written before a job runs.
    """
    flat = (len(matrices), *base.shape[-2:])
    flat_base = np.ascontiguousarray(base).reshape(flat).view(VIEWS[base_dtype])
    flat_out = out.reshape(flat).view(VIEWS[dtype])
    for e, components in enumerate(matrices):
        yield from _jobs(flat_base[e], flat_out[e], components)


def _jobs(base: Array, out: Array, components: Sequence[ComponentFactors]) -> Iterator[Callable[[], None]]:
    """Blocks of rows of one matrix."""
    rows, width = base.shape
    masks = [np.ascontiguousarray(component.mask) for component in components]
    scales = np.stack([component.row for component in components])
    columns = np.ones((len(components), -(-width // LANES) * LANES), np.float32)
    for k, component in enumerate(components):
        columns[k, :width] = component.col
    step = max(1, _BLOCK_BYTES // (width * base.itemsize))
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        yield _job(
            base[part], out[part], [mask[part] for mask in masks], np.ascontiguousarray(scales[:, part]), columns
        )


def _job(base: Array, out: Array, masks: Sequence[Array], scales: Array, columns: Array) -> Callable[[], None]:
    def job() -> None:
        # This call holds a reference to `masks`, so its addresses stay valid.
        addresses = tuple(mask.ctypes.data for mask in masks)
        _rebuild_rows(base, out, addresses, masks[0].strides[0], scales, columns)

    return job


def compile_for(base_dtype: DType, dtype: DType, components: int) -> None:
    """Compile the kernel of these dtypes and this number of components, or read it from numba's cache.

    This takes up to a second, which the first of `rebuild_jobs` would take otherwise.
    """
    base, out = np.zeros((0, LANES), VIEWS[base_dtype]), np.zeros((0, LANES), VIEWS[dtype])
    scales, columns = np.zeros((components, 0), np.float32), np.ones((components, LANES), np.float32)
    _rebuild_rows(base, out, (0,) * components, 0, scales, columns)


def rebuild(
    matrices: Sequence[Sequence[ComponentFactors]],
    base: Array,
    out: Array,
    *,
    base_dtype: DType,
    dtype: DType,
    threads: int | None = None,
) -> None:
    """out = base + components, with the bits of the reference. Arguments: see rebuild_jobs."""
    run_jobs(rebuild_jobs(matrices, base, out, base_dtype=base_dtype, dtype=dtype), threads=threads)
