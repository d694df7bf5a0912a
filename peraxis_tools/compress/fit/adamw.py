"""`--fit adamw`: the paper's fit of one module, from moments instead of cached activations.

    loss(s) = ||R - X Q(s)^T||^2 / (n d_out),  Q = sign(D) o s,  s = row or col vector, started at mean |D|

AdamW (row lr 1e-4, col and scalar lr 1e-5, weight decay 0.01, torch's implementation) runs for 5 epochs, with one step
for each calibration sample. The axis with the smaller held-out error wins. The gradient is that of the whole
calibration set, from G and C; the paper's steps take the gradient of one sample, which has the same mean and more
noise. The paper's full method (forward passes of two whole models for every module) is a benchmark
(benchmarks/fidelity.py), not an option.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from peraxis_format import Axis
from peraxis_tools.compress.fit.moments.sums import Moments
from peraxis_tools.compress.fit.scales import ComponentFit, start_component

__all__ = ["ADAMW_EPOCHS", "adamw_component"]

ADAMW_EPOCHS: Final = 5
_RATES: Final = {Axis.ROW: 1e-4, Axis.COL: 1e-5, Axis.TENSOR: 1e-5, Axis.ROW_COL: 1e-4}


def adamw_component(delta: Tensor, fine_tuned: Tensor, moments: Moments, axis: Axis, *, steps: int) -> ComponentFit:
    """Fit one component: signs of the delta, scales after `steps` steps. delta, fine_tuned: float32 [d_out, d_in]."""
    start = start_component(delta, axis)
    row, col = start.row.clone().requires_grad_(axis is not Axis.COL), start.col.clone()
    col.requires_grad_(axis in (Axis.COL, Axis.ROW_COL))
    signs = torch.where(start.signs, 1.0, -1.0)
    gram = moments.G.float()
    cross = delta @ gram
    if moments.E is not None:
        cross = cross + fine_tuned @ moments.E.float()
    count = max(moments.tokens, 1) * delta.shape[0]
    optimizer = torch.optim.AdamW([p for p in (row, col) if p.requires_grad], lr=_RATES[axis])
    with torch.enable_grad():
        for _ in range(steps):
            # A scalar is stored as one value in all of row; assigning the mean keeps these values equal.
            size = row.mean().expand_as(row) if axis is Axis.TENSOR else row
            dense = signs * size[:, None] * col
            # ||R - X Q^T||^2 = tr(Q G Q^T) - 2 tr(C Q^T) + constant
            loss = (torch.sum((dense @ gram) * dense) - 2 * torch.sum(cross * dense)) / count
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        final = row.mean().expand_as(row) if axis is Axis.TENSOR else row
        # The file stores magnitudes, so a scale that became negative flips its signs.
        turned = (final < 0)[:, None] ^ (col < 0)
        return ComponentFit(axis=axis, signs=start.signs ^ turned, row=final.abs().contiguous(), col=col.abs())
