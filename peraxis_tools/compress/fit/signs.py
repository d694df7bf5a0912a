"""Signs that compensate each other's errors: error feedback (GPTQ) and coordinate descent.

With target T [d_out, d_in], hessian H [d_in, d_in] (positive definite) and components Q = sum_k B_k o S_k,
S_k = row_k col_k^T >= 0, the objective is

    J(B) = tr((T - Q) H (T - Q)^T) = sum over rows o of (T - Q)_o H (T - Q)_o^T .

sign(T) minimises J only for a diagonal H. Two algorithms find a smaller J at the same size:

  gptq_signs          columns are decided one after the other; the error of column j is passed on to the columns not
                      yet decided, along U, the upper factor of H^-1 = U^T U (GPTQ's recursion with a grid of signs):
                          e = (T_j - Q_j) / U_jj ;  T_l -= e U_jl  for l > j
  coordinate_descent  with g = (T - Q) H, flipping one sign (Q_j -> -Q_j) changes a row's J by
                      4 (q_j g_j + q_j^2 H_jj). A sign is flipped exactly when that is negative, so J never grows;
                      then g += 2 q_j H_j. Few signs are flipped, so a sweep costs far less than a product with H.

Both process columns in blocks: steps within a block, and one matrix product for the columns outside it. The steps
within a block are compiled if numba or, on a GPU, Triton is installed (ops/sign_search). They may differ from torch's
in the last bit, and so, rarely, in a sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peraxis_tools.ops.sign_search import block_columns, coordinate_descent_block, gptq_signs_block

__all__ = ["Factor", "Magnitude", "coordinate_descent", "gptq_signs", "inverse_factor", "unit"]


@dataclass(frozen=True, slots=True)
class Magnitude:
    """The absolute value of one component, rank 1: S_ij = row_i * col_j. row: [d_out], col: [d_in], both >= 0."""

    row: Tensor
    col: Tensor


def unit(signs: Tensor) -> Tensor:
    """+1 and -1 as float32. This is several times as fast as torch.where, which branches on every sign."""
    return signs.float().mul_(2.0).sub_(1.0)


@dataclass(frozen=True, slots=True)
class Factor:
    """upper: float32 [d, d], upper triangular, with (H[order, order])^-1 = upper^T upper."""

    order: Tensor
    upper: Tensor

    def solved(self, rows: Tensor) -> Tensor:
        """rows H^-1. rows: float32 [n, d]."""
        found = torch.empty_like(rows)
        found[:, self.order] = (rows[:, self.order] @ self.upper.t()) @ self.upper
        return found


def inverse_factor(hessian: Tensor) -> Factor:
    """Order the columns by decreasing diagonal of H, and factor the inverse in this order.

    hessian: [d, d] float64, positive definite. With J the matrix that reverses the order and J H J = L L^T,
    H^-1 = (J L^-1 J)^T (J L^-1 J), and the product in brackets is upper triangular: the inverse is never formed.
    """
    order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
    turned = order.flip(0)
    lower = torch.linalg.cholesky(hessian[turned[:, None], turned])
    unit = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    inverse = torch.linalg.solve_triangular(lower, unit, upper=False, out=unit)
    return Factor(order=order, upper=inverse.float().flip(0, 1))


def gptq_signs(target: Tensor, magnitudes: list[Magnitude], factor: Factor) -> list[Tensor]:
    """Choose signs, bool [d_out, d_in] for each magnitude, by error feedback; components share each column's residual.

    target: [d_out, d_in] float32; factor: of `inverse_factor`.
    """
    upper = factor.upper
    work = target[:, factor.order]
    rows = torch.stack([magnitude.row for magnitude in magnitudes])
    cols = torch.stack([magnitude.col[factor.order] for magnitude in magnitudes])
    signs = torch.empty(len(magnitudes), *work.shape, dtype=torch.bool, device=work.device)
    for columns in _blocks(work.shape[1], block_columns(work)):
        values_block = work[:, columns].contiguous()
        errors = torch.empty_like(values_block)
        chosen = torch.empty(len(magnitudes), *values_block.shape, dtype=torch.bool, device=work.device)
        factor_block, cols_block = upper[columns, columns].contiguous(), cols[:, columns].contiguous()
        gptq_signs_block(values_block, factor_block, rows, cols_block, chosen, errors)
        signs[:, :, columns] = chosen
        work[:, columns.stop :].addmm_(errors, upper[columns, columns.stop :], alpha=-1)
    inverse_order = torch.argsort(factor.order)
    return [sign[:, inverse_order] for sign in signs]


def _blocks(width: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, width)) for start in range(0, width, size)]


def coordinate_descent(
    target: Tensor,
    magnitudes: list[Magnitude],
    signs: list[Tensor],
    hessian: Tensor,
    *,
    sweeps: int,
    gradient: Tensor | None = None,
) -> list[Tensor]:
    """Flip every sign that lowers J, column by column, for a number of sweeps. Returns new signs; J never grows.

    target: [d_out, d_in] float32; hessian: [d_in, d_in] float32; signs: bool [d_out, d_in] each; gradient: g, if it is
    known, which is overwritten.
    """
    values = torch.stack(
        [
            unit(sign).mul_(magnitude.col).mul_(magnitude.row[:, None])
            for sign, magnitude in zip(signs, magnitudes, strict=True)
        ]
    )
    gradient = (target - values.sum(dim=0)) @ hessian if gradient is None else gradient
    width = block_columns(values, descent=True)
    for _ in range(sweeps):
        changed = False
        for columns in _blocks(gradient.shape[1], width):
            values_block, size = gradient[:, columns].contiguous(), values[:, :, columns].contiguous()
            change = torch.zeros_like(values_block)
            coordinate_descent_block(values_block, hessian[columns, columns].contiguous(), size, change)
            if change.any():
                changed = True
                gradient[:, columns], values[:, :, columns] = values_block, size
                gradient[:, : columns.start].addmm_(change, hessian[columns, : columns.start])
                gradient[:, columns.stop :].addmm_(change, hessian[columns, columns.stop :])
        if not changed:
            break
    # A magnitude of zero does not show its sign.
    return [(value > 0) | ((value == 0) & sign) for sign, value in zip(signs, values, strict=True)]
