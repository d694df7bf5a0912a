"""`--fit none`: signs of the delta and mean magnitudes, one tensor pair in memory at a time, no model, no torch.

Least squared weight error for B = sign(D):  row r_i = mean_j |D_ij|,  col c_j = mean_i |D_ij|,  tensor s = mean |D|,
row+col: c from the columns' means, then r_i = sum_j |D_ij| c_j / sum_j c_j^2. The squared error follows from sums:

    row      ||D||^2 - d_in sum r_i^2          col    ||D||^2 - d_out sum c_j^2
    tensor   ||D||^2 - d_out d_in s^2          row+col    ||D||^2 - sum(r_i^2) sum(c_j^2)

A further component is the same for the residual of the components before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peraxis_format import Array, Axis, Component, DType, ShapeError, to_float32
from peraxis_format.ops.rebuild import rebuild
from peraxis_tools.compress.fit.directions import output_factors
from peraxis_tools.compress.fit.encode import encode_component
from peraxis_tools.ops.delta_sums import DeltaSums, delta_sums

__all__ = ["mean_components"]

_AXES = (Axis.ROW, Axis.COL, Axis.ROW_COL, Axis.TENSOR)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One batch element: its sums, its rank-1 rows, and the squared error of each axis."""

    sums: DeltaSums
    rank1_row: NDArray[np.float64]
    error: dict[Axis, float]


def mean_components(
    base: Array,
    fine_tuned: Array,
    *,
    base_dtype: DType,
    dtype: DType,
    axis: Axis | None,
    components: int,
    for_outputs: bool = False,
) -> tuple[Component, ...]:
    """Components of a pair of storage arrays [..., d_out, d_in]; axis None: least squared weight error.

    for_outputs: for a matrix that multiplies inputs, multiply each component's scales by the factor of
    directions.py. Returns () if both hold the same values. Raises ShapeError if a value is not finite.
    """
    shape = base.shape
    flat_tuned = fine_tuned.reshape(-1, *shape[-2:])
    chosen: list[Component] = []
    for _ in range(components):
        held, held_dtype = _with(chosen, base, base_dtype)
        matrices = [
            _measure(b, f, base_dtype=held_dtype, dtype=dtype)
            for b, f in zip(held.reshape(-1, *shape[-2:]), flat_tuned, strict=True)
        ]
        del held  # twice the tensor's size: freed before the next one is made
        if all(matrix.sums.square == 0.0 for matrix in matrices):
            break
        best = axis or min(_AXES, key=lambda a: sum(matrix.error[a] for matrix in matrices))
        mask = np.stack([matrix.sums.mask for matrix in matrices])
        row, col = _means(matrices, best, shape[-2:])
        if for_outputs:
            rest = to_float32(fine_tuned, dtype) - to_float32(*_with(chosen, base, base_dtype))
            row, col = _for_outputs(rest.reshape(-1, *shape[-2:]), mask, row, col, axis=best)
        chosen.append(encode_component(mask, row, col, axis=best, batch=shape[:-2]))
    return tuple(chosen)


def _for_outputs(
    deltas: NDArray[np.float32],
    mask: NDArray[np.uint8],
    row: NDArray[np.float64],
    col: NDArray[np.float64],
    *,
    axis: Axis,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The scales times the factors of directions.py, in the axis's vector; `tensor` has one for the batch."""
    by_row = axis in (Axis.ROW, Axis.ROW_COL)
    factors = np.stack(
        [output_factors(d, m, r, c, by_row=by_row) for d, m, r, c in zip(deltas, mask, row, col, strict=True)]
    )
    if axis is Axis.COL:
        return row, col * factors[:, :1]
    return row * (factors if by_row else factors.mean()), col


def _with(components: Sequence[Component], base: Array, dtype: DType) -> tuple[Array, DType]:
    """Base plus the components so far, in binary32 (SPEC 6.1 before its last rounding), and its dtype."""
    if not components:
        return base, dtype
    each = [component.factors(base.shape) for component in components]
    matrices = [list(factors) for factors in zip(*each, strict=True)]
    out = np.empty(base.shape, np.float32)
    rebuild(matrices, base, out, base_dtype=dtype, dtype=DType.F32)
    return out, DType.F32


def _measure(base: Array, fine_tuned: Array, *, base_dtype: DType, dtype: DType) -> _Matrix:
    def sums(weights: NDArray[np.float64] | None) -> DeltaSums:
        return delta_sums(base, fine_tuned, base_dtype=base_dtype, dtype=dtype, weights=weights)

    d_out, d_in = base.shape
    with np.errstate(invalid="ignore", over="ignore"):
        first = sums(None)
    if not np.isfinite(first.square):
        raise ShapeError("the delta has values that are not finite")
    col = first.col / d_out
    power = float(np.cumsum(col * col)[-1])
    rank1_row = sums(col).row / power if power > 0 else np.zeros(d_out)
    mean_row = first.row / d_in
    error = {
        Axis.ROW: first.square - d_in * _square(mean_row),
        Axis.COL: first.square - d_out * power,
        Axis.ROW_COL: first.square - _square(rank1_row) * power,
        Axis.TENSOR: first.square - d_out * d_in * (float(np.cumsum(mean_row)[-1]) / d_out) ** 2,
    }
    return _Matrix(sums=first, rank1_row=rank1_row, error=error)


def _square(values: NDArray[np.float64]) -> float:
    return float(np.cumsum(values * values)[-1])


def _means(
    matrices: Sequence[_Matrix], axis: Axis, shape: tuple[int, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(row [batch, d_out], col [batch, d_in]) of mean magnitudes; a vector that the axis does not have is ones."""
    d_out, d_in = shape
    row, col = np.ones((len(matrices), d_out)), np.ones((len(matrices), d_in))
    if axis is Axis.ROW:
        row = np.stack([matrix.sums.row for matrix in matrices]) / d_in
    if axis in (Axis.COL, Axis.ROW_COL):
        col = np.stack([matrix.sums.col for matrix in matrices]) / d_out
    if axis is Axis.ROW_COL:
        row = np.stack([matrix.rank1_row for matrix in matrices])
    if axis is Axis.TENSOR:
        row = row * (np.cumsum([np.cumsum(m.sums.row)[-1] for m in matrices])[-1] / (len(matrices) * d_out * d_in))
    return row, col
