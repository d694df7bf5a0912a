"""Signs that make up for each other: error feedback and coordinate descent.

With target T [d_out, d_in], hessian H [d_in, d_in] (positive definite) and components Q = sum_k B_k o S_k,
S_k = row_k col_k^T >= 0, the objective is

    J(B) = tr((T - Q) H (T - Q)^T) = sum over rows o of (T - Q)_o H (T - Q)_o^T .

sign(T) minimises J only for a diagonal H. Two passes do better at the same size:

  feedback  columns are decided one after the other; what column j gets wrong is passed on to the columns not yet
            decided, along U, the upper factor of H^-1 = U^T U (GPTQ's recursion with a grid of signs):
                e = (T_j - Q_j) / U_jj ;  T_l -= e U_jl  for l > j
  descend   with g = (T - Q) H, turning one sign (Q_j -> -Q_j) changes a row's J by 4 (q_j g_j + q_j^2 H_jj).
            A sign is turned exactly when that is negative, so J never grows; then g += 2 q_j H_j. Few signs are
            turned, so a sweep costs far less than a product with H.

Both run over columns in blocks: steps within a block, one matrix product for all that lies outside it. The steps
within a block are compiled where numba or, on a GPU, Triton is present (ops/sign_search); they may differ from torch's
in the last bit, and so, rarely, in a sign.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from peraxis_tools.ops.delta_sums.numpy import have_numba, have_triton

__all__ = ["Factor", "Magnitude", "coordinate_descent", "gptq_signs", "inverse_factor", "unit"]

_BLOCK = 128  # columns decided before what they leave is passed on to all others
_SWEPT = 512  # the same for descent on a CPU, where a column passes on little
_ROWS = 256  # rows a thread takes at a time


@dataclass(frozen=True, slots=True)
class Magnitude:
    """The absolute value of one component, rank 1: S_ij = row_i * col_j. row: [d_out], col: [d_in], both >= 0."""

    row: Tensor
    col: Tensor


def unit(signs: Tensor) -> Tensor:
    """+1 and -1 as float32; several times as fast as torch.where, which branches on every sign."""
    return signs.float().mul_(2.0).sub_(1.0)


@dataclass(frozen=True, slots=True)
class Factor:
    """upper: float32 [d, d], upper triangular, with (H[order, order])^-1 = upper^T upper."""

    order: Tensor
    upper: Tensor


def inverse_factor(hessian: Tensor) -> Factor:
    """Columns from the largest diagonal of H down, and the factor of the inverse in this order.

    hessian: [d, d] float64, positive definite. With J the matrix that turns the order around and J H J = L L^T,
    H^-1 = (J L^-1 J)^T (J L^-1 J), and the product in brackets is upper triangular: the inverse is never formed.
    """
    order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
    turned = order.flip(0)
    lower = torch.linalg.cholesky(hessian[turned][:, turned])
    unit = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    inverse = torch.linalg.solve_triangular(lower, unit, upper=False)
    return Factor(order=order, upper=inverse.flip(0, 1).float().contiguous())


def gptq_signs(target: Tensor, magnitudes: list[Magnitude], factor: Factor) -> list[Tensor]:
    """Signs (one bool [d_out, d_in] for each magnitude) by error feedback; components share each column's residual.

    target: [d_out, d_in] float32; factor: of `inverse_factor`.
    """
    upper = factor.upper
    work = target[:, factor.order]
    rows = torch.stack([magnitude.row for magnitude in magnitudes])
    cols = torch.stack([magnitude.col[factor.order] for magnitude in magnitudes])
    signs = torch.empty(len(magnitudes), *work.shape, dtype=torch.bool, device=work.device)
    step = _steps(work).gptq_signs
    for part in _blocks(work.shape[1], _BLOCK):
        values_block = work[:, part].contiguous()
        errors = torch.empty_like(values_block)
        chosen = torch.empty(len(magnitudes), *values_block.shape, dtype=torch.bool, device=work.device)
        step(values_block, upper[part, part].contiguous(), rows, cols[:, part].contiguous(), chosen, errors)
        signs[:, :, part] = chosen
        work[:, part.stop :].addmm_(errors, upper[part, part.stop :], alpha=-1)
    inverse_order = torch.argsort(factor.order)
    return [sign[:, inverse_order] for sign in signs]


def _blocks(width: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, width)) for start in range(0, width, size)]


def _gptq_signs_block(work: Tensor, block: Tensor, rows: Tensor, cols: Tensor, signs: Tensor, errors: Tensor) -> None:
    """work, errors: [d_out, n]; block: [n, n]; rows: [k, d_out]; cols: [k, n]; signs: bool [k, d_out, n]."""
    diagonal = torch.diagonal(block).tolist()
    columns = work.t().contiguous()
    for j in range(len(columns)):
        rest = columns[j]
        for k in range(len(rows)):
            size = rows[k] * cols[k, j]
            positive = rest >= 0
            signs[k, :, j] = positive
            rest = rest - torch.where(positive, size, -size)
        error = rest / diagonal[j]
        errors[:, j] = error
        columns[j + 1 :].addr_(block[j, j + 1 :], error, alpha=-1)


def coordinate_descent(
    target: Tensor, magnitudes: list[Magnitude], signs: list[Tensor], hessian: Tensor, *, sweeps: int
) -> list[Tensor]:
    """Turn every sign that lowers J, column by column, for a number of sweeps. Returns new signs; J never grows.

    target: [d_out, d_in] float32; hessian: [d_in, d_in] float32; signs: bool [d_out, d_in] each.
    """
    values = torch.stack(
        [
            unit(sign).mul_(magnitude.col).mul_(magnitude.row[:, None])
            for sign, magnitude in zip(signs, magnitudes, strict=True)
        ]
    )
    gradient = (target - values.sum(dim=0)) @ hessian
    steps = _steps(values)
    for _ in range(sweeps):
        changed = False
        for part in _blocks(gradient.shape[1], steps.width):
            values_block, size = gradient[:, part].contiguous(), values[:, :, part].contiguous()
            change = torch.zeros_like(values_block)
            steps.coordinate_descent(values_block, hessian[part, part].contiguous(), size, change)
            if change.any():
                changed = True
                gradient[:, part], values[:, :, part] = values_block, size
                gradient[:, : part.start].addmm_(change, hessian[part, : part.start])
                gradient[:, part.stop :].addmm_(change, hessian[part, part.stop :])
        if not changed:
            break
    # A magnitude of zero has lost its sign.
    return [(value > 0) | ((value == 0) & sign) for sign, value in zip(signs, values, strict=True)]


def _coordinate_descent_block(gradient: Tensor, block: Tensor, values: Tensor, change: Tensor) -> None:
    """gradient, change: [d_out, n]; block: [n, n]; values: [k, d_out, n], signed."""
    diagonal = torch.diagonal(block).tolist()
    columns = gradient.t().contiguous()
    for j in range(len(columns)):
        for k in range(len(values)):
            q = values[k, :, j]
            step = torch.where(q * (columns[j] + q * diagonal[j]) < 0, q + q, 0.0)
            values[k, :, j] -= step
            change[:, j] += step
            columns.addr_(block[j], step)
    gradient.copy_(columns.t())


@dataclass(frozen=True, slots=True)
class _Steps:
    """How a block of columns is worked on. width: columns of a block of descent."""

    gptq_signs: Callable[..., None]
    coordinate_descent: Callable[..., None]
    width: int


def _steps(tensor: Tensor) -> _Steps:
    """The fastest there is for a tensor's device: numba, Triton, or torch itself."""
    if tensor.device.type == "cpu" and have_numba():
        return _numba_steps()
    if tensor.device.type == "cuda" and have_triton():
        return _triton_steps()
    return _Steps(_gptq_signs_block, _coordinate_descent_block, _BLOCK)


@cache
def _triton_steps() -> _Steps:
    from peraxis_tools.ops.sign_search.triton import coordinate_descent_block, gptq_signs_block

    return _Steps(gptq_signs_block, coordinate_descent_block, _BLOCK)


@cache
def _numba_steps() -> _Steps:
    """The same formulas compiled, rows in parallel; rows, and so threads, never meet."""
    from peraxis_tools.ops.sign_search.numba import COORDINATE_DESCENT, GPTQ_SIGNS

    def in_threads(kernel: Callable[..., None]) -> Callable[..., None]:
        def step(*tensors: Tensor) -> None:
            arrays = [tensor.numpy() for tensor in tensors]
            height = arrays[0].shape[0]
            firsts = range(0, height, _ROWS)
            if len(firsts) <= 1 or torch.get_num_threads() == 1:
                kernel(0, height, *arrays)
                return
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(lambda first: kernel(first, min(height, first + _ROWS), *arrays), firsts))

        return step

    return _Steps(in_threads(GPTQ_SIGNS), in_threads(COORDINATE_DESCENT), _SWEPT)
