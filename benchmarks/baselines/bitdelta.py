"""BitDelta: W = W_b + a sign(D), one scalar a = mean |D| a module; then the scalars are distilled end to end."""

from __future__ import annotations

import torch

from baselines.distill import distill
from baselines.pair import Pair, SignedLinear
from peraxis_format import Axis

__all__ = ["bitdelta"]


def bitdelta(
    pair: Pair, distill_ids: torch.Tensor | None, *, lr: float = 1e-4, epochs: int = 5
) -> dict[str, SignedLinear]:
    """Modules by the name of their layer. distill_ids: int64 [samples, length]; None: the initial scalars."""
    modules = {
        name: SignedLinear.of(name, student.weight.detach().clone(), teacher.weight, Axis.TENSOR)
        for name, teacher, student in pair.linears()
    }
    if distill_ids is not None:
        distill(pair, modules, distill_ids, lr=lr, epochs=epochs)
    return modules
