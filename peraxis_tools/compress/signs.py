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
Work arrays are [d_in, d_out], so that a column of W is contiguous. On a CPU with numba the steps within a block are
compiled (signs_numba.py); they may differ from torch's in the last bit, and so, rarely, in a sign.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from peraxis_tools.compress.kernels import have_numba

__all__ = ["Magnitude", "descend", "feedback", "inverse_factor"]

_BLOCK = 128  # columns decided before what they leave is passed on to all others
_ROWS = 256  # rows a thread takes at a time


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
    """Signs (one bool [d_out, d_in] for each magnitude) by error feedback; components share each column's residual.

    target: [d_out, d_in] float32; factor: of `inverse_factor`.
    """
    order, upper = factor
    work = target.t()[order].contiguous()
    rows = torch.stack([magnitude.row for magnitude in magnitudes]).contiguous()
    cols = torch.stack([magnitude.col[order] for magnitude in magnitudes]).contiguous()
    signs = torch.empty(len(magnitudes), *work.shape, dtype=torch.bool, device=work.device)
    step = _compiled("feedback") if _compiles(work) else _feedback_block
    for start in range(0, len(work), _BLOCK):
        part = slice(start, min(start + _BLOCK, len(work)))
        near = upper[part, part].contiguous()
        errors = torch.empty_like(work[part])
        step(work[part], near, rows, cols[:, part].contiguous(), signs[:, part], errors)
        work[part.stop :].addmm_(upper[part, part.stop :].t(), errors, alpha=-1)
    inverse_order = torch.argsort(order)
    return [sign[inverse_order].t().contiguous() for sign in signs]


def _feedback_block(work: Tensor, near: Tensor, rows: Tensor, cols: Tensor, signs: Tensor, errors: Tensor) -> None:
    """work, errors: [n, d_out]; near: [n, n]; rows: [k, d_out]; cols: [k, n]; signs: bool [k, n, d_out]."""
    diagonal = torch.diagonal(near).tolist()
    for j in range(len(work)):
        rest = work[j]
        for k in range(len(rows)):
            size = rows[k] * cols[k, j]
            positive = rest >= 0
            signs[k, j] = positive
            rest = rest - torch.where(positive, size, -size)
        errors[j] = rest / diagonal[j]
        work[j + 1 :].addr_(near[j, j + 1 :], errors[j], alpha=-1)


def descend(
    target: Tensor, magnitudes: list[Magnitude], signs: list[Tensor], metric: Tensor, *, sweeps: int
) -> list[Tensor]:
    """Turn every sign that lowers J, column by column, for a number of sweeps. Returns new signs; J never grows.

    target: [d_out, d_in] float32; metric: [d_in, d_in] float32; signs: bool [d_out, d_in] each.
    """
    values = torch.stack(
        [
            torch.where(sign, 1.0, -1.0).t() * magnitude.col[:, None] * magnitude.row
            for sign, magnitude in zip(signs, magnitudes, strict=True)
        ]
    ).contiguous()
    turned = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    step = _compiled("descend") if _compiles(values) else _descend_block
    for _ in range(sweeps):
        gradient = metric @ (target.t() - values.sum(dim=0))
        changed = False
        for start in range(0, len(gradient), _BLOCK):
            part = slice(start, min(start + _BLOCK, len(gradient)))
            change = torch.zeros_like(gradient[part])
            step(gradient[part], metric[part, part].contiguous(), values[:, part], turned[:, part], change)
            gradient[: part.start].addmm_(metric[part, : part.start].t(), change)
            gradient[part.stop :].addmm_(metric[part, part.stop :].t(), change)
            changed = changed or bool(change.any())
        if not changed:
            break
    return [sign ^ turn.t() for sign, turn in zip(signs, turned, strict=True)]


def _descend_block(gradient: Tensor, near: Tensor, values: Tensor, turned: Tensor, change: Tensor) -> None:
    """gradient, change: [n, d_out]; near: [n, n]; values: [k, n, d_out], signed; turned: bool, as values."""
    diagonal = torch.diagonal(near).tolist()
    for j in range(len(gradient)):
        for k in range(len(values)):
            q = values[k, j]
            flip = q * (gradient[j] + q * diagonal[j]) < 0
            step = torch.where(flip, 2 * q, 0.0)
            turned[k, j] ^= flip
            values[k, j] -= step
            change[j] += step
            gradient.addr_(near[j], step)


def _compiles(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and have_numba()


@cache
def _compiled(name: str) -> Callable[..., None]:
    """The block step of this name in numba: the same formulas, rows in parallel; rows, and so threads, never meet."""
    from peraxis_tools.compress.signs_numba import DESCEND, FEEDBACK

    kernel = {"feedback": FEEDBACK, "descend": DESCEND}[name]

    def step(*tensors: Tensor) -> None:
        arrays = [tensor.numpy() for tensor in tensors]
        height = arrays[0].shape[1]
        firsts = range(0, height, _ROWS)
        if len(firsts) <= 1 or torch.get_num_threads() == 1:
            for first in firsts:
                kernel(first, min(height, first + _ROWS), *arrays)
            return
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(lambda first: kernel(first, min(height, first + _ROWS), *arrays), firsts))

    return step
