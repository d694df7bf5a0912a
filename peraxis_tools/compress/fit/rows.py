"""A large table of which the text uses few rows: signs are refined for these alone.

Rows share only the columns' scales. So the rows that the text uses are fitted in full, and the others with the columns'
scales of these: each component takes the signs of the residual, and a scale of the row in closed form. A text has
almost no information about a row whose token it does not contain, and refining such rows would take most of the time.
"""

from __future__ import annotations

from typing import Final

import torch

from peraxis_format import Axis
from peraxis_tools.compress.fit.fit import FitOptions, Hessian, Matrix, fit_components, quadratic
from peraxis_tools.compress.fit.scales import ComponentFit, fit_scales
from peraxis_tools.process.heap import trim_heap

__all__ = ["fit_used_rows", "has_unused_rows"]

_ROWS: Final = 1024  # that are fitted together; not fewer than inputs, for which W_f E H^-1 is shared
_MOST_USED: Final = 0.5


def has_unused_rows(matrix: Matrix, axis: Axis) -> bool:
    """Whether few enough rows are used, and the axis has a scale for each row."""
    if matrix.used is None or axis not in (Axis.ROW, Axis.ROW_COL):
        return False
    return 0.0 < float(matrix.used.float().mean()) < _MOST_USED


def fit_used_rows(
    matrix: Matrix, axis: Axis, hessian: Hessian, options: FitOptions, *, share: float = 1.0
) -> tuple[ComponentFit, ...]:
    """Fit the components of all rows; see above. share: that of the correction (fit.py)."""
    if matrix.used is None:
        raise ValueError("a matrix without known rows")
    used = matrix.used.nonzero()[:, 0]
    some = matrix.rows(used)
    problem = quadratic(some.delta + share * hessian.correction(some.fine_tuned), hessian)
    refined = fit_components(problem, axis, options, components=matrix.components)
    del problem
    trim_heap()  # of the trials
    signs = [torch.empty(matrix.base.shape, dtype=torch.bool, device=used.device) for _ in refined]
    rows = [some.base.new_empty(len(matrix.base)) for _ in refined]
    for k, component in enumerate(refined):
        signs[k][used], rows[k][used] = component.signs, component.row
    trim_heap()  # of the refined rows; the signs of all rows are the largest tensors of the fit
    for chosen in (~matrix.used).nonzero()[:, 0].split(max(_ROWS, matrix.base.shape[1])):
        some = matrix.rows(chosen)
        rest = some.delta + share * hessian.correction(some.fine_tuned)
        for k, component in enumerate(refined):
            start = ComponentFit(axis=Axis.ROW, signs=rest >= 0, row=rest.new_ones(len(rest)), col=component.col)
            found = fit_scales(start, rest, hessian.matrix)
            rest = rest - found.dense()
            signs[k][chosen], rows[k][chosen] = found.signs, found.row
    return tuple(
        ComponentFit(axis=axis, signs=signs[k], row=rows[k], col=component.col) for k, component in enumerate(refined)
    )
