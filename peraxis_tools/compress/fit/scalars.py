"""Fit one scale for each component of a matrix, with a part of the rows in memory at a time.

    J = tr((T - Q) H (T - Q)^T)     Q = sum_k s_k B_k     T = W_f - W_b + share W_f E H^-1 (fit.py)

Each B_k has the signs of the residual T - s_1 B_1 - .. - s_(k-1) B_(k-1), and then the s_k of least J. With

    A_km = tr(B_k H B_m^T)     b_k = tr(B_k H T^T)

J is quadratic in the scales, so they are solved in turn without the matrix: s_k = (b_k - sum_(m != k) A_km s_m) / A_kk.

A table of a large vocabulary is the largest matrix of a model, and fit_components keeps several copies of a matrix.
This keeps its signs, one byte for each weight and component.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from peraxis_format import Axis
from peraxis_tools.compress.fit.fit import Hessian, Matrix
from peraxis_tools.compress.fit.gram import dot
from peraxis_tools.compress.fit.scales import ComponentFit
from peraxis_tools.compress.fit.signs import unit

__all__ = ["fit_scalars"]

_ROWS: Final = 1024  # not fewer than inputs, for which W_f E H^-1 is shared


def fit_scalars(matrix: Matrix, hessian: Hessian, *, share: float, rounds: int) -> tuple[ComponentFit, ...]:
    """Fit the components of axis `tensor`, the largest scale first. rounds: how often the scales are solved in turn."""
    device = matrix.base.device
    signs = [torch.empty(matrix.base.shape, dtype=torch.bool, device=device) for _ in range(matrix.components)]
    scales: list[float] = []
    for k in range(matrix.components):
        above = below = 0.0
        for rows, rest in _targets(matrix, hessian, share):
            for sign, scale in zip(signs, scales, strict=False):
                rest.sub_(unit(sign[rows]), alpha=scale)
            signs[k][rows] = rest >= 0
            pattern = unit(signs[k][rows])
            image = pattern @ hessian.matrix
            above += dot(image, rest)
            below += dot(image, pattern)
        scales.append(above / below if below > 0.0 else 0.0)
    if len(scales) > 1 and rounds:
        products, right = _system(matrix, hessian, signs, share)
        for _ in range(rounds):
            for k, row in enumerate(products):
                others = sum(row[m] * scale for m, scale in enumerate(scales) if m != k)
                scales[k] = (right[k] - others) / row[k] if row[k] > 0.0 else 0.0
    for sign, scale in zip(signs, scales, strict=True):
        if scale < 0.0:
            sign.logical_not_()
    ones = torch.ones(matrix.base.shape[1], device=device)
    found = (
        ComponentFit(axis=Axis.TENSOR, signs=sign, row=torch.full((len(sign),), abs(scale), device=device), col=ones)
        for sign, scale in zip(signs, scales, strict=True)
    )
    return tuple(sorted(found, key=lambda component: -float(component.row[0])))


def _targets(matrix: Matrix, hessian: Hessian, share: float) -> Iterator[tuple[slice, Tensor]]:
    """T of some rows after others, float32 [n, d_in]."""
    step = max(_ROWS, matrix.base.shape[1])
    for begin in range(0, len(matrix.base), step):
        rows = slice(begin, begin + step)
        some = matrix.rows(rows)
        yield rows, some.delta.add_(hessian.correction(some.fine_tuned), alpha=share)


def _system(
    matrix: Matrix, hessian: Hessian, signs: list[Tensor], share: float
) -> tuple[list[list[float]], list[float]]:
    """A and b."""
    count = len(signs)
    products, right = [[0.0] * count for _ in range(count)], [0.0] * count
    for rows, target in _targets(matrix, hessian, share):
        for k in range(count):
            image = unit(signs[k][rows]) @ hessian.matrix
            right[k] += dot(image, target)
            for m in range(k + 1):
                products[k][m] += dot(image, unit(signs[m][rows]))
                products[m][k] = products[k][m]
    return products, right
