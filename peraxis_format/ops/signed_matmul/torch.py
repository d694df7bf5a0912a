"""signed_matmul in plain torch, the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peraxis_format.ops.rebuild.torch import ComponentTensors, row_blocks

__all__ = ["project"]


def project(x: Tensor, components: Sequence[ComponentTensors], d_out: int) -> Tensor:
    """x (sum of components)^T. x: [rows, d_in]. Returns float32 [rows, d_out]."""
    wide = x.float()
    out = torch.zeros(len(x), d_out, device=x.device)
    for component in components:
        scaled = wide * component.col
        for rows in row_blocks(d_out, len(component.col)):
            out[:, rows] += (scaled @ component.signs(rows).t()) * component.row[rows]
    return out
