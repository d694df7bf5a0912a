"""A factor for the mean |D| scales of a delta that lowers the error of the outputs, without a text.

Mean magnitudes give the least squared error of the weights. But a fine-tune changes the outputs of a layer along few
directions: its gradients are sums of (output error) x (input), so D^T D shows the inputs of its training. Most of the
energy of sign(D) lies in other directions, and mean magnitudes restore these directions only in part. So each row is
multiplied by the f that minimises

    (d - f q) H (d - f q)^T      H = (1 - e) D^T D / m + e I      m: mean of the diagonal of D^T D

with d a row of D, q the same row of the component and e = 0.3; a component without scales by row has one f for all.
D^T D is taken from a sketch: S = Omega D with _DIRECTIONS rows of random signs, of which S^T S is the mean. Because the
magnitudes are least squares, d q^T = q q^T. Sums are binary64 and f is rounded to 1/256, so that no library of linear
algebra changes a byte.

Rejected: signs chosen for the same H (worse than sign(D)), columns solved for it (no better than rows alone, and a
system of d_in x d_in for each module), random signs where D is 0 (no difference), scales of least error after rounding
to BF16 (no difference).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from peraxis_format import unpack_signs

__all__ = ["output_errors", "output_factors"]

_DIRECTIONS: Final = 32
_ISOTROPIC: Final = 0.3  # e
_GRID: Final = 256
_MOST: Final = 8.0  # larger factors come from rows with almost no delta
_DRAWN: Final = 256  # rows whose random signs are drawn together
_ROWS: Final = 64  # rows of a block, which stays in a processor's cache

Vector = NDArray[np.float64]


def output_factors(
    delta: NDArray[np.float32], mask: NDArray[np.uint8], row: Vector, col: Vector, *, by_row: bool
) -> Vector:
    """f for each row of one matrix: float64 [d_out]; all are equal unless by_row.

    delta: [d_out, d_in]; the component is sign o (row col^T), with mask as the file packs signs (SPEC 5.2), row [d_out]
    and col [d_in] of least squared error.
    """
    sketch = _sketch(delta)
    energy = float(np.square(sketch).sum())
    if not energy > 0.0:
        return np.ones(len(delta))
    share = (1.0 - _ISOTROPIC) * delta.shape[1] / energy
    weighted = (sketch * col).T
    above, below = np.empty(len(delta)), np.empty(len(delta))
    for start in range(0, len(delta), _ROWS):
        rows = slice(start, start + _ROWS)
        signs = np.where(unpack_signs(mask[rows], delta.shape[1]), 1.0, -1.0)
        along_q = row[rows, None] * (signs @ weighted)
        along_d = delta[rows].astype(np.float64) @ sketch.T
        above[rows] = share * (along_d * along_q).sum(axis=1)
        below[rows] = share * np.square(along_q).sum(axis=1)
    isotropic = _ISOTROPIC * np.square(row) * float(np.square(col).sum())
    above, below = above + isotropic, below + isotropic
    if not by_row:
        above, below = np.full_like(above, above.sum()), np.full_like(below, below.sum())
    factors = np.divide(above, below, out=np.ones_like(above), where=below > 0.0)
    rounded: Vector = np.clip(np.round(factors * _GRID), 1.0, _MOST * _GRID) / _GRID
    return rounded


def output_errors(residuals: Iterable[NDArray[np.float32]], delta: NDArray[np.float32]) -> list[float]:
    """tr(R H R^T) for each R that is left of a delta; residuals, delta: [d_out, d_in]."""
    sketch = _sketch(delta)
    energy = float(np.square(sketch).sum())
    share = (1.0 - _ISOTROPIC) * float(delta.shape[1]) / energy if energy > 0.0 else 0.0
    plain = _ISOTROPIC if energy > 0.0 else 1.0
    errors = []
    for residual in residuals:
        along = isotropic = 0.0
        for start in range(0, len(residual), _ROWS):
            block = residual[start : start + _ROWS].astype(np.float64)
            along += float(np.square(block @ sketch.T).sum())
            isotropic += float(np.vdot(block, block))
        errors.append(share * along + plain * isotropic)
    return errors


def _sketch(delta: NDArray[np.float32]) -> Vector:
    """Omega D, float64 [_DIRECTIONS, d_in]; Omega depends on the number of rows alone."""
    draw = np.random.Generator(np.random.PCG64(len(delta)))
    found = np.zeros((_DIRECTIONS, delta.shape[1]))
    for start in range(0, len(delta), _DRAWN):
        drawn = delta[start : start + _DRAWN]
        signs = 2.0 * draw.integers(0, 2, (_DIRECTIONS, len(drawn))) - 1.0
        for first in range(0, len(drawn), _ROWS):
            rows = slice(first, first + _ROWS)
            found += signs[:, rows] @ drawn[rows].astype(np.float64)
    return found
