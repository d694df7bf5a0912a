"""Fit a dense delta into k masks by closed forms, streamed by rows: each mask is a least squares fit of the residual.

    b = sign(R)        r_i = sum_j |R_ij| c_j / sum_j c_j^2        c_j = sum_i |R_ij| r_i / sum_i r_i^2

first r for c = 1 (the means of |R|), then c for that r, then r for that c rounded to F16. Each half step is the least
squares solution for the values of the other. So b o (r c^T) is a rank-1 fit of |R|, a thousandth above the best one,
and never worse than one scale per row. R is D minus the components so far, rounded as in the file. With
S_i = sum_j |R_ij| c_j the error of a mask is

    ||R - b o (r c^T)||^2 = ||R||^2 - 2 sum_i r_i S_i + sum_i r_i^2 sum_j c_j^2

so it needs no further pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_format.ops.backend import choose
from peraxis_tools.deltas.factors import ComponentSum, weighted
from peraxis_tools.deltas.rows import row_blocks
from peraxis_tools.ops.delta_sums import DeltaSums, delta_sums
from peraxis_tools.ops.merge_rows import columns

__all__ = ["AnyDense", "Dense", "Fit", "fit_masks"]

_TINY: Final = float(np.finfo(np.float64).tiny)

# Returns rows of a dense matrix [d_out, d_in], which the caller may change; called several times.
Dense: TypeAlias = Callable[[slice], NDArray[np.float32]]
AnyDense: TypeAlias = Dense | Callable[[slice], NDArray[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Components and their error: square_error = ||D - fit||^2, square_norm = ||D||^2."""

    components: tuple[pxd.Component, ...]
    square_error: float
    square_norm: float


def fit_masks(matrix: Callable[[tuple[int, ...]], Dense], covered: tuple[int, ...], masks: int) -> Fit:
    """Fit `masks` row+col components to a delta of this covered shape, with two passes over it for each mask.

    matrix: returns the rows of the matrix at an index of the batch.
    """
    batch, (rows, cols) = covered[:-2], covered[-2:]
    fits = [_fit_matrix(matrix(index), (rows, cols), masks) for index in np.ndindex(*batch)]
    return Fit(
        components=tuple(_stack([fit.components[k] for fit in fits], batch) for k in range(masks)),
        square_error=math.fsum(fit.square_error for fit in fits),
        square_norm=math.fsum(fit.square_norm for fit in fits),
    )


def _fit_matrix(dense: Dense, shape: tuple[int, int], masks: int) -> Fit:
    chosen: tuple[pxd.ComponentFactors, ...] = ()
    components: list[pxd.Component] = []
    norm = left = 0.0
    for k in range(masks):
        residual = _Residual(dense, ComponentSum(components=chosen, shape=shape))
        component, square, left = _component(residual)
        norm = norm if k else square
        components.append(component)
        chosen += tuple(weighted(factors, -1.0) for factors in component.factors(shape))
    return Fit(components=tuple(components), square_error=left, square_norm=norm)


@dataclass(frozen=True, slots=True)
class _Residual:
    """A matrix and the components that are subtracted from it."""

    dense: Dense
    chosen: ComponentSum

    def rows(self, rows: slice) -> NDArray[np.float32]:
        block = self.dense(rows)
        self.chosen.add(rows, block)
        return block


def _component(residual: _Residual) -> tuple[pxd.Component, float, float]:
    """The component, ||R||^2, and the squared error that remains."""
    d_out, d_in = shape = residual.chosen.shape
    blocks = list(row_blocks(shape))
    zeros = np.zeros((blocks[0].stop, d_in), np.float32)
    row, sums = np.empty(d_out), np.zeros(d_in)
    squares = []
    for rows in blocks:
        block = residual.rows(rows)
        found = _sums(block, zeros, None)
        row[rows] = found.row / d_in
        sums += columns(block, row[rows])
        squares.append(found.square)
    # Round c to F16 first, so that r compensates its rounding.
    col16, exponent = pxd.encode_scales(sums / max(float(row @ row), _TINY))
    col = np.ldexp(col16.astype(np.float64), exponent)
    power = float(col @ col)
    mask = np.empty((d_out, pxd.mask_width(d_in)), np.uint8)
    size = np.empty(d_out)
    for rows in blocks:
        block = residual.rows(rows)
        found = _sums(block, zeros, col)
        mask[rows], size[rows] = found.mask, found.row
    row16, col16, exponent = pxd.encode_scale_pair(size / max(power, _TINY), col)
    component = pxd.Component(axis=pxd.Axis.ROW_COL, exponent=exponent, mask=mask, row=row16, col=col16)
    # `size` was summed for col; the rounded pair has col times a power of two, which the rows' exponent undoes.
    rounded = np.ldexp(row16.astype(np.float64), exponent) * _ratio(col16, col)
    square = math.fsum(squares)
    return component, square, max(0.0, square - 2.0 * float(rounded @ size) + float(rounded @ rounded) * power)


def _sums(block: NDArray[np.float32], zeros: NDArray[np.float32], weights: NDArray[np.float64] | None) -> DeltaSums:
    """Signs, weighted sums of rows and the sum of squares of R, on this thread. zeros: at least as many rows."""
    kind, backend = pxd.DType.F32, choose("merge_rows", block.size)
    return delta_sums(
        zeros[: len(block)], block, base_dtype=kind, dtype=kind, weights=weights, threads=1, backend=backend
    )


def _ratio(rounded: NDArray[np.float16], wanted: NDArray[np.float64]) -> float:
    """The power of two between a vector and its rounded F16 form; 1 for zeros."""
    largest = int(np.argmax(wanted))
    return float(rounded[largest]) / float(wanted[largest]) if wanted[largest] > 0.0 else 1.0


def _stack(components: list[pxd.Component], batch: tuple[int, ...]) -> pxd.Component:
    """Stack the matrices' components into one with a common exponent; the differences go into the rows."""
    first = components[0]
    if not batch:
        return first
    rows = [np.ldexp(c.row.astype(np.float64), c.exponent) for c in components if c.row is not None]
    cols = [c.col.astype(np.float64) for c in components if c.col is not None]
    row, col, exponent = pxd.encode_scale_pair(np.stack(rows), np.stack(cols))
    return pxd.Component(
        axis=pxd.Axis.ROW_COL,
        exponent=exponent,
        mask=np.stack([c.mask for c in components]).reshape(*batch, *first.mask.shape),
        row=row.reshape(*batch, -1),
        col=col.reshape(*batch, -1),
    )
