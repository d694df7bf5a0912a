"""LoRA of a full fine-tune at a number of bytes: W = W_base + L R, rank r, F16 factors.

L R begins as the truncated singular value decomposition of the delta, the best approximation of that rank in weights.
Then both factors may be trained end to end, like the scales of the other baselines. One rank serves all matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from baselines.distill import distill
from baselines.pair import Pair

__all__ = ["LowRank", "equal_rank", "lora", "truncated"]

_LEARNING_RATE: Final = 1e-4


@dataclass(slots=True)
class LowRank:
    """One module: base [d_out, d_in], left [d_out, r], right [r, d_in], float32."""

    base: Tensor
    left: Tensor
    right: Tensor

    def parameters(self) -> list[Tensor]:
        """Both factors."""
        return [self.left, self.right]

    def weight(self) -> Tensor:
        """float32 [d_out, d_in], differentiable in the factors."""
        return self.base + self.left @ self.right

    def rounded(self) -> Tensor:
        """The weight from F16 factors, float32 [d_out, d_in]."""
        return self.base + self.left.half().float() @ self.right.half().float()


def equal_rank(shapes: Iterable[tuple[int, ...]], budget: int) -> int:
    """The largest rank for all matrices of `shapes` whose F16 factors take at most `budget` bytes."""
    return max(0, budget // sum(2 * (rows + columns) for rows, columns in shapes))


@torch.no_grad()
def truncated(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [d_out, rank] and [rank, d_in] of the best approximation of a delta, float32 [d_out, d_in]."""
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).contiguous(), (root[:, None] * vt[:rank]).contiguous()


def lora(pair: Pair, rank: int, distill_ids: Tensor | None, *, epochs: int = 5) -> Mapping[str, LowRank]:
    """Modules by the name of their layer. distill_ids: int64 [samples, length]; None: the decomposition alone."""
    modules = {}
    for name, teacher, student in pair.linears():
        base = student.weight.detach().clone()
        modules[name] = LowRank(base, *truncated(teacher.weight.detach() - base, rank))
    if distill_ids is not None:
        distill(pair, modules, distill_ids, lr=_LEARNING_RATE, epochs=epochs)
    return modules
