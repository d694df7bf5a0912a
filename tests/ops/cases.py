"""Special operands for rounding, signs and NaN, one kind per case, for every float type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

import peraxis_format as pxd
from peraxis_format.delta import BaseRef

__all__ = ["BITWISE_CASES", "FLOATS", "base_of", "module_of"]

FLOATS: Final = (pxd.DType.BF16, pxd.DType.F16, pxd.DType.F32)
_SHAPES: Final = {"odd width": (11, 37), "batch": (2, 3, 5, 24)}
BITWISE_CASES: Final = ("finite", "infinite", "NaN", "subnormal", "halfway", "odd width", "batch")
_MANTISSA: Final = {pxd.DType.BF16: 7, pxd.DType.F16: 10, pxd.DType.F32: 23}
_EXPONENT_BITS: Final = {pxd.DType.BF16: 8, pxd.DType.F16: 5, pxd.DType.F32: 8}


def _bits(dtype: pxd.DType, values: np.ndarray) -> pxd.Array:
    return values.astype(f"u{dtype.itemsize}").view(dtype.storage)


def base_of(case: str, dtype: pxd.DType, seed: int = 0) -> pxd.Array:
    """Return a base tensor [..., d_out, d_in] in which at least a quarter of the values are of the case's kind."""
    rng = np.random.default_rng(seed)
    shape = _SHAPES.get(case, (9, 40))
    normal = pxd.from_float32(rng.standard_normal(shape, np.float32), dtype)
    mantissa, top = _MANTISSA[dtype], 8 * dtype.itemsize - 1
    infinity = ((1 << _EXPONENT_BITS[dtype]) - 1) << mantissa
    sign = rng.integers(0, 2, shape, np.uint64) << np.uint64(top)
    low = rng.integers(1, 1 << mantissa, shape, np.uint64)
    special: dict[str, Callable[[], np.ndarray]] = {
        "infinite": lambda: sign | np.where(rng.random(shape) < 0.5, infinity, infinity - 1).astype(np.uint64),
        "NaN": lambda: sign | np.uint64(infinity) | low,
        "subnormal": lambda: sign | low,
        # 1 to 2: a scale of half a unit in the last place then lies between two values.
        "halfway": lambda: sign | np.uint64(((1 << (_EXPONENT_BITS[dtype] - 1)) - 1) << mantissa) | low,
    }
    if case not in special:
        return normal
    chosen = _bits(dtype, special[case]())
    return chosen if case == "halfway" else np.where(rng.random(shape) < 0.6, chosen, normal)


def _exponent(case: str, dtype: pxd.DType) -> int:
    """Return e so that 2^e times a scale of 1 is half a unit, or near the largest or smallest values, for the case."""
    largest = 15 if dtype is pxd.DType.F16 else 63
    smallest = -24 if dtype is pxd.DType.F16 else -64
    return {"halfway": -_MANTISSA[dtype] - 1, "infinite": largest, "subnormal": smallest}.get(case, -6)


def module_of(
    case: str, base: pxd.Array, base_dtype: pxd.DType, dtype: pxd.DType, axes: tuple[pxd.Axis, ...], seed: int = 1
) -> pxd.ModuleDelta:
    """Return a `sign` module on the base. Scales are 1 for `halfway`, else between 0 and 2, some of them 0."""
    rng = np.random.default_rng(seed)
    shape = base.shape
    components = []
    for axis in axes:
        scales = {
            name: np.ones(dims, np.float16)
            if case == "halfway"
            else np.where(rng.random(dims) < 0.1, 0.0, rng.uniform(0.0, 2.0, dims)).astype(np.float16)
            for name, dims in pxd.scale_shapes(axis, shape).items()
        }
        components.append(
            pxd.Component(
                axis=axis, exponent=_exponent(case, dtype), mask=pxd.pack_signs(rng.random(shape) < 0.5), **scales
            )
        )
    return pxd.ModuleDelta(
        name="w",
        shape=shape,
        dtype=dtype,
        encoding=pxd.Encoding.SIGN,
        base=BaseRef(dtype=base_dtype, shape=shape, sha256="0" * 64),
        components=tuple(components),
    )
