"""A dense delta into k masks, closed form, streamed by rows: least squares for each mask on what the ones before leave.

    b = sign(R)        r_i = sum_j |R_ij| c_j / sum_j c_j^2        c_j = sum_i |R_ij| r_i / sum_i r_i^2

first r for c = 1 (the means of |R|), then c for that r, then r for that c as the file holds it (F16). Each half step is
the least-squares solution for the other's values; b o (r c^T) is thus a rank-1 fit of |R|, a thousandth above the best
one, and never worse than one scale a row. R is D minus the terms that are chosen already, as the file holds them. With
S_i = sum_j |R_ij| c_j a mask leaves

    ||R - b o (r c^T)||^2 = ||R||^2 - 2 sum_i r_i S_i + sum_i r_i^2 sum_j c_j^2

so that no further pass measures it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_tools.merge.factors import Terms, component_terms, joined
from peraxis_tools.ops.merge_rows.numpy import columns, row_sums
from peraxis_tools.rows import row_blocks

__all__ = ["Dense", "Fit", "fit_masks"]

# Rows of a dense matrix [d_out, d_in], new or one's own to change; asked for several times.
Dense: TypeAlias = Callable[[slice], NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Components and what they leave: square_error = ||D - fit||^2 of square_norm = ||D||^2."""

    components: tuple[pxd.Component, ...]
    square_error: float
    square_norm: float


def fit_masks(matrix: Callable[[tuple[int, ...]], Dense], covered: tuple[int, ...], bits: int) -> Fit:
    """Fit `bits` row+col components to a delta of this covered shape, two passes over it for each mask.

    matrix: the rows of the matrix at an index of the batch.
    """
    batch = covered[:-2]
    fits = [_fit_matrix(matrix(index), covered[-2:], bits) for index in np.ndindex(batch)]
    return Fit(
        components=tuple(_stack([fit.components[k] for fit in fits], batch) for k in range(bits)),
        square_error=math.fsum(fit.square_error for fit in fits),
        square_norm=math.fsum(fit.square_norm for fit in fits),
    )


def _fit_matrix(dense: Dense, shape: tuple[int, int], bits: int) -> Fit:
    chosen: list[Terms] = []
    components: list[pxd.Component] = []
    norm = left = 0.0
    for k in range(bits):
        residual = _Residual(dense, shape, joined(chosen) if chosen else None)
        component, square, left = _component(residual)
        norm = norm if k else square
        components.append(component)
        chosen.append(component_terms(component, shape, weight=-1.0))
    return Fit(components=tuple(components), square_error=left, square_norm=norm)


@dataclass(frozen=True, slots=True)
class _Residual:
    """A matrix and the terms that are taken from it already."""

    dense: Dense
    shape: tuple[int, int]
    chosen: Terms | None

    def rows(self, rows: slice) -> NDArray[np.float32]:
        block = self.dense(rows)
        if self.chosen is not None:
            self.chosen.add(rows, block)
        return block


def _component(residual: _Residual) -> tuple[pxd.Component, float, float]:
    """The component, ||R||^2, and what it leaves of it."""
    d_out, d_in = residual.shape
    blocks = list(row_blocks(residual.shape))
    zeros = np.zeros((blocks[0].stop, d_in), np.float32)
    row, sums = np.empty(d_out), np.zeros(d_in)
    squares = []
    for rows in blocks:
        block = residual.rows(rows)
        _, size, square = row_sums(block, zeros[: len(block)], None)
        row[rows] = size / d_in
        sums += columns(block, row[rows])
        squares.append(square)
    # What the file can hold of c, so that r makes up for its rounding.
    col16, exponent = pxd.encode_scales(sums / max(float(row @ row), _TINY))
    col = np.ldexp(col16.astype(np.float64), exponent)
    power = float(col @ col)
    mask = np.empty((d_out, pxd.mask_width(d_in)), np.uint8)
    size = np.empty(d_out)
    for rows in blocks:
        block = residual.rows(rows)
        mask[rows], size[rows], _ = row_sums(block, zeros[: len(block)], col)
    row16, col16, exponent = pxd.encode_scale_pair(size / max(power, _TINY), col)
    component = pxd.Component(axis=pxd.Axis.ROW_COL, exponent=exponent, mask=mask, row=row16, col=col16)
    # `size` was summed for col; the stored pair is that col times a power of two, which the rows' exponent takes back.
    stored = np.ldexp(row16.astype(np.float64), exponent) * _ratio(col16, col)
    square = math.fsum(squares)
    return component, square, max(0.0, square - 2.0 * float(stored @ size) + float(stored @ stored) * power)


_TINY = float(np.finfo(np.float64).tiny)


def _ratio(stored: NDArray[np.float16], wanted: NDArray[np.float64]) -> float:
    """The power of two that is between a vector and what it became in F16; 1 for zeros."""
    largest = int(np.argmax(wanted))
    return float(stored[largest]) / float(wanted[largest]) if wanted[largest] > 0.0 else 1.0


def _stack(components: list[pxd.Component], batch: tuple[int, ...]) -> pxd.Component:
    """The matrices' components as one: their exponents become one, the differences go into the rows."""
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
