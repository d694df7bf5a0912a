"""The compiled kernels give the bits of the reference for all values, shapes, dtypes and numbers of threads."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peraxis_format import Axis, Component, DType, Encoding, ModuleDelta, mask_width, reconstruct, to_float32
from peraxis_format.delta import BaseRef
from peraxis_format.dtypes import Array
from peraxis_format.thread_pool import run_jobs

fast = pytest.importorskip("peraxis_format.ops.rebuild.numba", reason="numba is not installed")
pair_sums = pytest.importorskip("peraxis_tools.ops.delta_sums.numba").pair_sums

FLOATS = [DType.BF16, DType.F16, DType.F32]
# Special bit patterns: zeros, subnormals, ties, the largest finite values, infinities, NaN payloads.
SPECIAL = {
    DType.BF16: [0, 0x8000, 1, 0x8001, 0x7F, 0x80, 0x3F80, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7F81, 0x7FC1, 0xFFFF],
    DType.F16: [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x3C00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0x7E01, 0xFFFF],
    DType.F32: [0, 1 << 31, 1, 0x7FFFFF, 0x800000, 0x33000000, 0x3F808000, 0x477FF000, 0x7F7FFFFF, 0x7F800000,
                0xFF800000, 0x7F800001, 0x7FC12345, 0xFFFFFFFF],
}  # fmt: skip


def random_weights(rng: np.random.Generator, dtype: DType, shape: tuple[int, ...]) -> Array:
    """Return random bit patterns, a quarter of them special ones."""
    kind = np.dtype(f"u{dtype.itemsize}")
    bits = rng.integers(0, 1 << (8 * dtype.itemsize), shape, dtype=np.uint64)
    special = rng.choice(np.array(SPECIAL[dtype], np.uint64), shape)
    return np.where(rng.random(shape) < 0.25, special, bits).astype(kind).view(dtype.storage)


def random_component(rng: np.random.Generator, axis: Axis, covered: tuple[int, ...]) -> Component:
    """Return any signs (unused bits zero), any finite scales without a sign bit, and any exponent."""
    d_in = covered[-1]
    mask = rng.integers(0, 256, (*covered[:-1], mask_width(d_in)), dtype=np.uint8)
    if d_in % 8:
        mask[..., -1] &= (1 << d_in % 8) - 1

    def scale(shape: tuple[int, ...]) -> Array:
        return rng.integers(0, 0x7C00, shape, dtype=np.uint16).view(np.float16)

    return Component(
        axis=axis,
        exponent=int(rng.integers(-64, 64)),
        mask=mask,
        row=scale(covered[:-1]) if axis in (Axis.ROW, Axis.ROW_COL) else None,
        col=scale((*covered[:-2], d_in)) if axis in (Axis.COL, Axis.ROW_COL) else None,
        scalar=scale((1,)) if axis is Axis.TENSOR else None,
    )


def module_of(components: tuple[Component, ...], shape: tuple[int, ...], base: DType, dtype: DType) -> ModuleDelta:
    ref = BaseRef(dtype=base, shape=shape, sha256="0" * 64)
    return ModuleDelta(
        name="w", shape=shape, dtype=dtype, encoding=Encoding.SIGN, base=ref, components=components
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 67)),
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 20)),
    ),
    axes=st.lists(st.sampled_from(list(Axis)), min_size=1, max_size=3),
    base_dtype=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FLOATS),
)
def test_compiled_reconstruction_has_the_bits_of_the_reference(
    seed: int, shape: tuple[int, ...], axes: list[Axis], base_dtype: DType, dtype: DType
) -> None:
    rng = np.random.default_rng(seed)
    base = random_weights(rng, base_dtype, shape)
    module = module_of(tuple(random_component(rng, axis, shape) for axis in axes), shape, base_dtype, dtype)
    expected = reconstruct(module, base, backend="numpy")
    assert reconstruct(module, base, backend="numba").tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_exponent_and_every_scale_gives_the_reference_bits(dtype: DType) -> None:
    rng = np.random.default_rng(7)
    shape = (0x7C, 256)
    for exponent in (-64, -24, -1, 0, 63):
        scales = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
        component = Component(
            axis=Axis.COL,
            exponent=exponent,
            mask=rng.integers(0, 256, (*shape[:1], 32), dtype=np.uint8),
            col=scales[:256] if exponent < 0 else scales[-256:],
        )
        base = random_weights(rng, dtype, shape)
        module = module_of((component,), shape, dtype, dtype)
        assert (
            reconstruct(module, base, backend="numba").tobytes() == reconstruct(module, base, backend="numpy").tobytes()
        )


def test_threads_and_blocks_change_no_bit_and_in_place_is_allowed() -> None:
    rng = np.random.default_rng(3)
    shape = (3000, 1001)
    base = random_weights(rng, DType.BF16, shape)
    components = (random_component(rng, Axis.ROW_COL, shape), random_component(rng, Axis.TENSOR, shape))
    expected = reconstruct(module_of(components, shape, DType.BF16, DType.BF16), base, backend="numpy")
    for threads in (1, 2, 3):
        out = base.copy()
        fast.rebuild(
            module_of(components, shape, DType.BF16, DType.BF16).factors(),
            out,
            out,
            base_dtype=DType.BF16,
            dtype=DType.BF16,
            threads=threads,
        )
        assert out.tobytes() == expected.tobytes()


def reference_sums(base: Array, tuned: Array, weights: Array) -> tuple[Array, Array, Array, float]:
    """Compute the sums in plain numpy in the order of `pair_sums`."""
    delta = tuned - base
    width = delta.shape[1]
    wide = np.zeros((len(delta), -(-width // 8) * 8))
    wide[:, :width] = np.abs(delta)
    w = np.zeros(wide.shape[1])
    w[:width] = weights

    def lanes(values: Array) -> Array:
        total = np.zeros((len(values), 8))
        for group in range(values.shape[1] // 8):
            total += values[:, 8 * group : 8 * group + 8]
        out = total[:, 0].copy()
        for lane in range(1, 8):
            out += total[:, lane]
        return out

    columns = np.zeros(width)
    for begin in range(0, len(delta), 64):
        chunk = np.zeros(width)
        for row in wide[begin : begin + 64, :width]:
            chunk += row
        columns += chunk
    mask = np.packbits(delta >= 0, axis=-1, bitorder="little")
    return mask, lanes(wide * w), columns, float(np.cumsum(lanes(wide * wide))[-1])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 200),
    width=st.integers(1, 70),
    base_dtype=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FLOATS),
    weighted=st.booleans(),
    threads=st.integers(1, 3),
)
def test_pair_sums_are_those_of_the_stated_order(
    seed: int, rows: int, width: int, base_dtype: DType, dtype: DType, weighted: bool, threads: int
) -> None:
    rng = np.random.default_rng(seed)
    wide = rng.normal(size=(2, rows, width)).astype(np.float32)
    base, tuned = (
        (part.view(np.uint32) >> 16).astype(np.uint16) if d is DType.BF16 else part.astype(d.storage)
        for part, d in zip(wide, (base_dtype, dtype), strict=True)
    )
    weights = rng.random(width) if weighted else np.ones(width)
    expected = reference_sums(to_float32(base, base_dtype), to_float32(tuned, dtype), weights)
    found = pair_sums(
        base, tuned, base_dtype=base_dtype, dtype=dtype, weights=weights if weighted else None, threads=threads
    )
    for wanted, got in zip(expected, found, strict=True):
        assert np.array_equal(wanted, got)


def test_a_failing_job_is_raised_when_no_job_runs_any_more() -> None:
    running = []

    def slow() -> None:
        running.append(1)
        time.sleep(0.05)
        running.pop()

    def fail() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run_jobs(iter([slow, fail, *[slow] * 5]), threads=2)
    assert not running
