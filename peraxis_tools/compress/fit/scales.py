"""Closed forms for the scales of given signs.

Target T [d_out, d_in], hessian H [d_in, d_in], signs B; the fitted delta is Q = B o S. Minimise over S

    J = tr((T - Q) H (T - Q)^T)

    row      S_ij = r_i       r_i = (P_i . (T H)_i) / (P_i H P_i^T)                    P = B o col
    col      S_ij = c_j       (H o (P^T P)) c = diag(P^T T H)                          P = row o B
    row+col  S_ij = r_i c_j   the two in turn, each with the other inside P
    tensor   S_ij = s         s = sum(B o (T H)) / sum(B o (B H))

(o: elementwise.) The solve for col is regularised towards mean |T| per column by a thousandth of the mean diagonal,
because with few tokens H o (P^T P) is nearly singular. A negative scale means that the flipped signs of the row or
column are better: it is folded into B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from peraxis_format import Axis, encode_scales
from peraxis_tools.compress.fit.gram import add_gram
from peraxis_tools.compress.fit.signs import Magnitude, unit

__all__ = ["ComponentFit", "fit_scales", "mean_magnitudes", "start_component", "round_scales_f16"]

_RIDGE = 1e-3
_ROUNDS = 3
_EXACT: Final = 1e-5  # F16, in which scales are stored, has a rounding error of 5e-4
_STEPS: Final = 48  # of conjugate gradients; a factor of a matrix of 1500 takes as long as some 40
_CACHED = 1 << 17  # numbers of float32 that a processor's cache holds


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentFit:
    """One component during a fit: signs bool [d_out, d_in], row [d_out] and col [d_in] float32, both >= 0.

    The axis says which of the two is free; the other is all ones. For `tensor` the one scale fills row.
    image: (B o col) H, float32 [d_out, d_in], if the fit of the rows has computed it.
    """

    axis: Axis
    signs: Tensor
    row: Tensor
    col: Tensor
    image: Tensor | None = None

    @property
    def magnitude(self) -> Magnitude:
        """The absolute values, rank 1."""
        return Magnitude(row=self.row, col=self.col)

    def dense(self) -> Tensor:
        """B o S, float32 [d_out, d_in]."""
        return unit(self.signs).mul_(self.col).mul_(self.row[:, None])


def round_scales_f16(component: ComponentFit) -> ComponentFit:
    """The component with scales rounded to F16 under its exponent, as the file stores them (SPEC 5.5)."""

    def rounded(scales: Tensor) -> Tensor:
        half, exponent = encode_scales(scales.double().cpu().numpy())
        values = np.ldexp(half.astype(np.float64), exponent)
        return torch.from_numpy(values).to(dtype=scales.dtype, device=scales.device)

    has_row = component.axis is not Axis.COL
    has_col = component.axis in (Axis.COL, Axis.ROW_COL)
    return replace(
        component,
        row=rounded(component.row) if has_row else component.row,
        col=rounded(component.col) if has_col else component.col,
    )


def mean_magnitudes(target: Tensor, axis: Axis) -> Magnitude:
    """The scales of least squared weight error for B = sign(T): means of |T| along the axis.

    row+col: one alternation from the columns' means, r_i = sum_j |T_ij| c_j / sum_j c_j^2.
    """
    size = target.abs()
    row, col = torch.ones_like(size[:, 0]), torch.ones_like(size[0])
    if axis is Axis.ROW:
        row = size.mean(dim=1)
    elif axis is Axis.TENSOR:
        row = row * size.mean()
    else:
        col = size.mean(dim=0)
    if axis is Axis.ROW_COL:
        row = (size @ col) / col.square().sum().clamp_min(torch.finfo(col.dtype).tiny)
    return Magnitude(row=row, col=col)


def start_component(target: Tensor, axis: Axis) -> ComponentFit:
    """sign(T) with mean magnitudes: a component without calibration."""
    start = mean_magnitudes(target, axis)
    return ComponentFit(axis=axis, signs=target >= 0, row=start.row, col=start.col)


def fit_scales(
    component: ComponentFit,
    target: Tensor,
    hessian: Tensor,
    *,
    target_hessian: Tensor | None = None,
    rounds: int = _ROUNDS,
) -> ComponentFit:
    """Fit the scales of least J for the component's signs; signs are flipped only where a scale is negative.

    target: float32 [d_out, d_in]; hessian: float32 [d_in, d_in]; target_hessian: their product, if it is known;
    rounds: alternations of row+col; one is enough if the scales are near their optimum.
    """
    target_hessian = target @ hessian if target_hessian is None else target_hessian
    if component.axis is Axis.ROW:
        return _fit_row(component, target_hessian, hessian)
    if component.axis is Axis.COL:
        return _fit_col(component, target, target_hessian, hessian)
    if component.axis is Axis.TENSOR:
        return _fit_scalar(component, target_hessian, hessian)
    for _ in range(rounds):
        component = _fit_row(_fit_col(component, target, target_hessian, hessian), target_hessian, hessian)
    # row and col have one free common factor; split it evenly, because F16 has a small range.
    balance = torch.sqrt(component.col.mean() / component.row.mean())
    if not torch.isfinite(balance) or float(balance) == 0.0:
        return component
    image = None if component.image is None else component.image / balance
    return replace(component, row=component.row * balance, col=component.col / balance, image=image)


def _fold(
    component: ComponentFit, *, row: Tensor | None = None, col: Tensor | None = None, image: Tensor | None = None
) -> ComponentFit:
    signs = component.signs
    if row is not None:
        signs = signs ^ (row < 0)[:, None]
    if col is not None:
        signs = signs ^ (col < 0)
    return replace(
        component,
        signs=signs,
        row=component.row if row is None else row.abs(),
        col=component.col if col is None else col.abs(),
        image=image,
    )


def _fit_row(component: ComponentFit, target_hessian: Tensor, hessian: Tensor) -> ComponentFit:
    row, image = torch.empty_like(component.row), torch.empty_like(target_hessian)
    for rows in _row_ranges(target_hessian, _CACHED):
        pattern = unit(component.signs[rows]).mul_(component.col)
        torch.mm(pattern, hessian, out=image[rows])
        below = torch.sum(image[rows] * pattern, dim=1)
        above = torch.sum(pattern.mul_(target_hessian[rows]), dim=1)
        row[rows] = torch.where(below > 0, above / below, torch.zeros_like(above))
        image[rows].mul_(torch.where(row[rows] < 0, -1.0, 1.0)[:, None])  # the signs of such rows are flipped
    return _fold(component, row=row, image=image)


def _fit_col(component: ComponentFit, target: Tensor, target_hessian: Tensor, hessian: Tensor) -> ComponentFit:
    width = len(hessian)
    system, right = torch.zeros_like(hessian), torch.zeros(width, dtype=torch.float64, device=hessian.device)
    prior = torch.zeros_like(right)
    for rows in _row_ranges(target, max(_CACHED, width * width)):
        pattern = unit(component.signs[rows]).mul_(component.row[rows, None])
        add_gram(system, pattern)
        prior += torch.sum(pattern * target[rows], dim=0)
        right += torch.sum(pattern.mul_(target_hessian[rows]), dim=0)
    system.mul_(hessian)
    ridge = _RIDGE * torch.diagonal(system).double().mean()
    if float(ridge) <= 0.0:
        return component
    prior /= component.row.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    system.diagonal().add_(ridge)
    col = _solved(system, right + ridge * prior, start=component.col)
    return component if col is None else _fold(component, col=col.float())


def _row_ranges(matrix: Tensor, numbers: int) -> list[slice]:
    """Rows of the matrix, about so many numbers at a time, so that what is computed from them stays in the cache."""
    count = max(1, numbers // matrix.shape[1])
    return [slice(start, start + count) for start in range(0, len(matrix), count)]


def _solved(system: Tensor, right: Tensor, *, start: Tensor) -> Tensor | None:
    """system^-1 right, float64 [d]; None if the system is not positive definite.

    system: float32 [d, d], which is changed. Its diagonal is scaled to ones, because a few inputs of a language model
    are far larger than the others: then float32 is exact enough, at half the time of float64. The signs of two columns
    hardly agree, so the other elements are small, and a few steps of conjugate gradients from `start` replace a factor,
    which is computed where they do not suffice.
    """
    size = torch.diagonal(system).double().rsqrt()
    system.mul_(size.float()).mul_(size.float()[:, None])
    scaled = (size * right).float()
    found = conjugate_gradients(system, scaled, (start.double() / size).float())
    if found is None:
        factor, failed = torch.linalg.cholesky_ex(system)
        if int(failed) != 0:
            return None
        found = torch.cholesky_solve(scaled[:, None], factor)[:, 0]
    return found * size


def conjugate_gradients(system: Tensor, right: Tensor, start: Tensor) -> Tensor | None:
    """system^-1 right, float32 [d], to _EXACT of the norm of `right`; None if _STEPS steps do not reach that.

    system: symmetric, float32 [d, d]. The residual that decides is computed from the solution, not by recurrence.
    """
    largest = float(right.abs().max())
    if largest == 0.0 or not math.isfinite(largest):
        return torch.zeros_like(right) if largest == 0.0 else None
    right, found = right / largest, start / largest  # so that no square is too large or too small
    wanted = _EXACT * float(torch.linalg.vector_norm(right))
    rest = right - system @ found
    direction, energy = rest.clone(), float(torch.dot(rest, rest))
    for _ in range(_STEPS):
        if math.sqrt(energy) <= wanted:
            break
        image = system @ direction
        curvature = float(torch.dot(direction, image))
        if not curvature > 0.0:
            return None
        found.add_(direction, alpha=energy / curvature)
        rest.sub_(image, alpha=energy / curvature)
        before, energy = energy, float(torch.dot(rest, rest))
        direction.mul_(energy / before).add_(rest)
    return found * largest if float(torch.linalg.vector_norm(right - system @ found)) <= 2 * wanted else None


def _fit_scalar(component: ComponentFit, target_hessian: Tensor, hessian: Tensor) -> ComponentFit:
    pattern = unit(component.signs)
    below = torch.sum((pattern @ hessian) * pattern, dtype=torch.float64)
    above = torch.sum(pattern * target_hessian, dtype=torch.float64)
    scalar = float(above / below) if float(below) > 0 else 0.0
    return _fold(component, row=torch.full_like(component.row, scalar))
