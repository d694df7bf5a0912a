"""A dense delta into k masks, closed form, streamed by rows: least squares for each mask on what the ones before leave.

    b = sign(R)        r_i = sum_j |R_ij| c_j / sum_j c_j^2        c_j = sum_i |R_ij| r_i / sum_i r_i^2

the two in turn from c = 1, so that the first rows are the means of |R|. Each half step is the least-squares solution
for the other's values; the term b o (r c^T) is thus the rank-1 fit of |R| that the starting point leads to, and never
worse than one scale a row. R is D minus the terms that are chosen already, as the file holds them (F16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_tools.rows import row_blocks

__all__ = ["Dense", "Fit", "fit_masks"]

# Rows of a dense delta [..., d_out, d_in] by ranges of its first dimension; asked for several times.
Dense: TypeAlias = Callable[[slice], NDArray[np.float32]]

_ROUNDS: Final = 2  # the third changes the error by less than a thousandth


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Components and what they leave: square_error = ||D - fit||^2 of square_norm = ||D||^2."""

    components: tuple[pxd.Component, ...]
    square_error: float
    square_norm: float


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One matrix of the batch: its dense rows, and the terms chosen so far."""

    dense: Callable[[slice], NDArray[np.float32]]
    d_out: int
    d_in: int

    def residuals(self, chosen: list[pxd.Component]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        for rows in row_blocks((self.d_out, self.d_in)):
            block = self.dense(rows)
            for component in chosen:
                block = block - _term(component, self.d_in, rows)
            yield rows, block


def fit_masks(dense: Dense, covered: tuple[int, ...], bits: int) -> Fit:
    """Fit `bits` row+col components to a delta of this covered shape. Passes over it: 3 for each mask, and one more."""
    d_out, d_in = covered[-2:]
    batch = covered[:-2]
    fitted: list[list[pxd.Component]] = []
    error = norm = 0.0
    for index in np.ndindex(batch):
        matrix = _Matrix(_rows_of(dense, index), d_out, d_in)
        chosen: list[pxd.Component] = []
        for _ in range(bits):
            chosen.append(_component(matrix, chosen))
        fitted.append(chosen)
        error += math.fsum(_square(block) for _, block in matrix.residuals(chosen))
        norm += math.fsum(_square(block) for _, block in matrix.residuals([]))
    components = tuple(_stack([chosen[k] for chosen in fitted], batch) for k in range(bits))
    return Fit(components=components, square_error=error, square_norm=norm)


def _square(block: NDArray[np.float32]) -> float:
    return float(np.square(block, dtype=np.float64).sum())


def _rows_of(dense: Dense, index: tuple[int, ...]) -> Callable[[slice], NDArray[np.float32]]:
    if not index:
        return dense
    return lambda rows: dense(slice(index[0], index[0] + 1))[(0, *index[1:])][rows]


def _component(matrix: _Matrix, chosen: list[pxd.Component]) -> pxd.Component:
    row = np.zeros(matrix.d_out)
    col = np.ones(matrix.d_in)
    mask = np.zeros((matrix.d_out, pxd.mask_width(matrix.d_in)), np.uint8)
    for last in (*[False] * _ROUNDS, True):
        sums = np.zeros(matrix.d_in)
        for rows, residual in matrix.residuals(chosen):
            size = np.abs(residual)
            row[rows] = size @ col / max(float(col @ col), np.finfo(np.float64).tiny)
            if last:
                mask[rows] = pxd.pack_signs(residual >= 0.0)
            else:
                sums += row[rows] @ size
        square = float(row @ row)
        if not last and square > 0.0:
            col = sums / square
    row16, col16, exponent = pxd.encode_scale_pair(row, col)
    return pxd.Component(axis=pxd.Axis.ROW_COL, exponent=exponent, mask=mask, row=row16, col=col16)


def _term(component: pxd.Component, d_in: int, rows: slice) -> NDArray[np.float32]:
    signs = pxd.unpack_signs(component.mask[rows], d_in)
    row, col = component.row, component.col
    if row is None or col is None:
        raise pxd.ShapeError("a fitted component has both scales")
    scale = row[rows].astype(np.float32)[:, None] * col.astype(np.float32) * np.float32(2.0**component.exponent)
    return np.where(signs, scale, -scale)


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
