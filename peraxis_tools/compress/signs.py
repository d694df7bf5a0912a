"""Signs that make up for each other: error feedback and coordinate descent.

With target T [d_out, d_in], metric H [d_in, d_in] (positive definite) and components Q = sum_k B_k o S_k,
S_k = row_k col_k^T >= 0, the objective is

    J(B) = tr((T - Q) H (T - Q)^T) = sum over rows o of (T - Q)_o H (T - Q)_o^T .

sign(T) minimises J only for a diagonal H. Two passes do better at the same size:

  feedback  columns are decided one after the other; what column j gets wrong is passed on to the columns not yet
            decided, along U, the upper Cholesky factor of H^-1 = U^T U (GPTQ's recursion with a grid of signs):
                e = (T_j - Q_j) / U_jj ;  T_l -= e U_jl  for l > j
  descend   with g = (T - Q) H, turning one sign (Q_j -> -Q_j) changes a row's J by 4 (q_j g_j + q_j^2 H_jj).
            A sign is turned exactly when that is negative, so J never grows. One sweep costs one product with H.

Both run over columns in blocks: vector steps within a block, one matrix product for all that lies outside it.
Work arrays are [d_in, d_out], so that a column of W is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Magnitude", "descend", "feedback", "inverse_factor"]

_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Magnitude:
    """The absolute value of one component, rank 1: S_ij = row_i * col_j. row: [d_out], col: [d_in], both >= 0."""

    row: Tensor
    col: Tensor


def inverse_factor(metric: Tensor) -> tuple[Tensor, Tensor]:
    """(order, U): columns from the largest diagonal of H down, and upper U with (H[order, order])^-1 = U^T U.

    metric: [d, d] float64, positive definite. U is float32.
    """
    order = torch.argsort(torch.diagonal(metric), descending=True, stable=True)
    factor = torch.linalg.cholesky(metric[order][:, order])
    inverse = torch.cholesky_inverse(factor)
    return order, torch.linalg.cholesky(inverse, upper=True).float()


def feedback(target: Tensor, magnitudes: list[Magnitude], factor: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Signs (one bool [d_out, d_in] for each magnitude) by error feedback; the components share each column's residual.

    target: [d_out, d_in] float32; factor: of `inverse_factor`.
    """
    order, upper = factor
    work = target.t()[order].contiguous()
    columns = [magnitude.col[order] for magnitude in magnitudes]
    signs = [torch.empty(work.shape, dtype=torch.bool, device=work.device) for _ in magnitudes]
    width = work.shape[0]
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        block, near = work[start:end], upper[start:end, start:end]
        errors = torch.empty_like(block)
        diagonal = torch.diagonal(near).tolist()
        for j in range(end - start):
            rest = block[j]
            for k, magnitude in enumerate(magnitudes):
                size = magnitude.row * columns[k][start + j]
                positive = rest >= 0
                signs[k][start + j] = positive
                rest = rest - torch.where(positive, size, -size)
            errors[j] = rest / diagonal[j]
            block[j + 1 :].addr_(near[j, j + 1 :], errors[j], alpha=-1)
        work[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    inverse_order = torch.argsort(order)
    return [sign[inverse_order].t().contiguous() for sign in signs]


def descend(
    target: Tensor, magnitudes: list[Magnitude], signs: list[Tensor], metric: Tensor, *, sweeps: int
) -> list[Tensor]:
    """Turn every sign that lowers J, column by column, for a number of sweeps. Returns new signs; J never grows.

    target: [d_out, d_in] float32; metric: [d_in, d_in] float32; signs: bool [d_out, d_in] each.
    """
    values = [
        torch.where(sign, 1.0, -1.0).t().contiguous() * magnitude.col[:, None] * magnitude.row
        for sign, magnitude in zip(signs, magnitudes, strict=True)
    ]
    width = target.shape[1]
    diagonal = torch.diagonal(metric).tolist()
    turned = [torch.zeros(value.shape, dtype=torch.bool, device=value.device) for value in values]
    for _ in range(sweeps):
        gradient = metric @ (target.t() - sum(values))
        changed = False
        for start in range(0, width, _BLOCK):
            end = min(start + _BLOCK, width)
            near, steps = metric[start:end, start:end], torch.zeros_like(gradient[start:end])
            block = gradient[start:end]
            for j in range(end - start):
                for value, turn in zip(values, turned, strict=True):
                    q = value[start + j]
                    flip = q * (block[j] + q * diagonal[start + j]) < 0
                    step = torch.where(flip, 2 * q, 0.0)
                    turn[start + j] ^= flip
                    value[start + j] -= step
                    steps[j] += step
                    block.addr_(near[j], step)
            gradient[:start].addmm_(metric[start:end, :start].t(), steps)
            gradient[end:].addmm_(metric[start:end, end:].t(), steps)
            changed = changed or bool(steps.any())
        if not changed:
            break
    return [sign ^ turn.t() for sign, turn in zip(signs, turned, strict=True)]
