"""End-to-end distillation as in both papers: AdamW on all scales at once, mean squared error on the logits.

    minimise over all scales   mean over tokens and vocabulary of (logits_student - logits_teacher)^2

A step takes one sample. The learning rate is constant. The teacher's logits are computed when they are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import mse_loss

from baselines.pair import Pair

__all__ = ["Trainable", "distill"]

_SEED: Final = 0  # of the order of the samples


class Trainable(Protocol):
    """A linear layer with parameters that a distillation trains."""

    def parameters(self) -> list[Tensor]:
        """Leaf tensors, float32."""

    def weight(self) -> Tensor:
        """float32 [d_out, d_in], differentiable in the parameters."""


def distill(pair: Pair, modules: Mapping[str, Trainable], ids: Tensor, *, lr: float, epochs: int) -> None:
    """Train the parameters of `modules` (layer name -> module) in place. ids: int64 [samples, length]."""
    parameters = [parameter.requires_grad_(True) for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    generator = torch.Generator().manual_seed(_SEED)
    for _ in range(epochs):
        for i in torch.randperm(len(ids), generator=generator).tolist():
            batch = ids[i : i + 1]
            with torch.no_grad():
                target = pair.teacher(input_ids=batch, use_cache=False).logits
            weights = {f"{name}.weight": module.weight() for name, module in modules.items()}
            logits = functional_call(pair.student, weights, kwargs={"input_ids": batch, "use_cache": False}).logits
            optimizer.zero_grad(set_to_none=True)
            mse_loss(logits, target).backward()
            optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
