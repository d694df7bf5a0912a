"""The published procedure of Per-Axis Weight Deltas: activation matching per module, then distillation.

    for each linear layer of each block, in order:
        run the whole student and the whole teacher on every calibration and validation sample; keep the inputs of
        the student's layer (X) and the outputs of the teacher's layer (Y)
        for axis in row, col:
            S = mean |D| along the axis
            5 epochs, one sample per step:  AdamW on S,  minimising  mean (Y - X (W_b + S o B)^T - bias)^2
        keep the axis with the smaller error on the validation samples; put the layer into the student
    distil all scales end to end on the logits

The hyperparameters are 50 calibration samples, AdamW with learning rate 1e-4 for row and 1e-5 for col, and 5 epochs.
The distillation takes 150 samples and learning rate 1e-5. The published code runs 110 forward passes per module: 55
samples through two models. Here the last 5 of the 55 are for validation. Three faults of that code are left out,
because they only make the results worse: the student starts as a copy of the fine-tune, the bias is dropped, and the
axis is chosen on the last training batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, mse_loss

from baselines.distill import distill
from baselines.pair import Pair, SignedLinear
from peraxis_format import Axis

__all__ = ["PaperSettings", "fit_modules", "paper"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperSettings:
    """The hyperparameters of the paper. batch: samples per forward pass when activations are collected."""

    row_lr: float = 1e-4
    col_lr: float = 1e-5
    epochs: int = 5
    distill_lr: float = 1e-5
    distill_epochs: int = 5
    batch: int = 1


def paper(
    pair: Pair,
    fit_ids: Tensor,
    validation_ids: Tensor,
    distill_ids: Tensor | None,
    *,
    settings: PaperSettings | None = None,
) -> dict[str, SignedLinear]:
    """Run the procedure. Returns layer name -> module and changes pair.student.

    The ids are int64 [samples, length]. Without distill_ids there is no distillation.
    """
    settings = settings or PaperSettings()
    modules = fit_modules(pair, fit_ids, validation_ids, settings)
    if distill_ids is not None:
        distill(pair, modules, distill_ids, lr=settings.distill_lr, epochs=settings.distill_epochs)
    return modules


def fit_modules(
    pair: Pair,
    fit_ids: Tensor,
    validation_ids: Tensor,
    settings: PaperSettings,
    *,
    progress: Callable[[str], None] | None = None,
) -> dict[str, SignedLinear]:
    """Fit one module after the other. Each goes into pair.student before the next one is fitted."""
    modules: dict[str, SignedLinear] = {}
    ids = torch.cat([fit_ids, validation_ids])
    for name, teacher, student in pair.linears():
        inputs = _gather(pair.student, student, ids, settings.batch, output=False)
        targets = _gather(pair.teacher, teacher, ids, settings.batch, output=True)
        count = len(fit_ids)
        fitted = []
        for axis, lr in ((Axis.ROW, settings.row_lr), (Axis.COL, settings.col_lr)):
            module = SignedLinear.of(name, student.weight.detach().clone(), teacher.weight, axis)
            _train(module, teacher.bias, inputs[:count], targets[:count], lr=lr, epochs=settings.epochs)
            fitted.append((_error(module, teacher.bias, inputs[count:], targets[count:]), module))
        modules[name] = min(fitted, key=lambda pair_: pair_[0])[1]
        with torch.no_grad():
            student.weight.copy_(modules[name].weight())
        if progress is not None:
            progress(name)
    return modules


@torch.no_grad()
def _gather(model: nn.Module, layer: nn.Linear, ids: Tensor, batch: int, *, output: bool) -> list[Tensor]:
    """Return the inputs or outputs of a layer for each sample, [length, width], from forward passes of the model."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        seen.extend((result if output else args[0]).detach().clone().unbind(0))

    handle = layer.register_forward_hook(hook)
    try:
        for part in ids.split(batch):
            model(input_ids=part, use_cache=False)
    finally:
        handle.remove()
    return seen


def _train(
    module: SignedLinear, bias: Tensor | None, inputs: list[Tensor], targets: list[Tensor], *, lr: float, epochs: int
) -> None:
    module.scale = module.scale.clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([module.scale], lr=lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for i in torch.randperm(len(inputs), generator=generator).tolist():
            optimizer.zero_grad(set_to_none=True)
            mse_loss(linear(inputs[i], module.weight(), bias), targets[i]).backward()
            optimizer.step()
    module.scale = module.scale.detach()


@torch.no_grad()
def _error(module: SignedLinear, bias: Tensor | None, inputs: list[Tensor], targets: list[Tensor]) -> float:
    weight = module.weight()
    errors = [float(mse_loss(linear(x, weight, bias), y)) for x, y in zip(inputs, targets, strict=True)]
    return sum(errors) / len(errors)
