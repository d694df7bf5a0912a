"""sign_search in plain torch, the reference: column by column, all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["coordinate_descent_block", "gptq_signs_block"]


def gptq_signs_block(work: Tensor, block: Tensor, rows: Tensor, cols: Tensor, signs: Tensor, errors: Tensor) -> None:
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


def coordinate_descent_block(gradient: Tensor, block: Tensor, values: Tensor, change: Tensor) -> None:
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
