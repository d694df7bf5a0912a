"""BitDelta: W = W_b + a sign(D), with one scalar a = mean |D| per module. The scalars are then distilled end to end."""

from __future__ import annotations

from typing import Final

import torch

from baselines.distill import distill
from baselines.pair import Pair, SignedLinear
from peraxis_format import Axis

__all__ = ["bitdelta"]

_EPOCHS: Final = 5


def bitdelta(pair: Pair, distill_ids: torch.Tensor | None, *, lr: float = 1e-4) -> dict[str, SignedLinear]:
    """Return layer name -> module. distill_ids: int64 [samples, length]; None keeps the initial scalars."""
    modules = {
        name: SignedLinear.of(name, student.weight.detach().clone(), teacher.weight, Axis.TENSOR)
        for name, teacher, student in pair.linears()
    }
    if distill_ids is not None:
        distill(pair, modules, distill_ids, lr=lr, epochs=_EPOCHS)
    return modules
