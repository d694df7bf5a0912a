"""AdamW with a schedule for each group of parameters; it can be resumed after it was killed.

Each rate has a linear warm-up, then a cosine to zero, then stays zero; there is no weight decay. The latents of signs
have an optimizer of their own (latents.py), with such a schedule. After each epoch the full state is saved in the work
folder: parameters, moments, and the number of epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from peraxis_tools.compress.distill.latents import SignLatents
from peraxis_tools.compress.run.work_folder import WorkFolder

__all__ = ["Group", "TrainingState", "Training"]

_WARM_UP = 0.05
_PART = "distilling"  # a part of the work folder
_SUMS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters, or latents of signs, with one rate. lr: its peak; share: the share of all steps that trains them."""

    parameters: Sequence[nn.Parameter] = ()
    latents: Sequence[SignLatents] = ()
    lr: float
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """The progress: the number of whole epochs, the best loss after an epoch, and the loss before the first epoch."""

    epochs: int
    best: float
    before: float


class Training:
    """The optimizer of the groups over a number of steps."""

    def __init__(self, groups: Sequence[Group], *, steps: int) -> None:
        self._groups = [group for group in groups if group.parameters]
        self._signs = [group for group in groups if group.latents]
        self._latents = [latents for group in self._signs for latents in group.latents]
        self._steps = steps
        self._parameters = [parameter for group in self._groups for parameter in group.parameters]
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.AdamW([{"params": group.parameters} for group in self._groups], weight_decay=0.0)

    def step(self, number: int, backward: Callable[[], None]) -> None:
        """Take one optimizer step with the gradients that `backward` adds."""
        for group, its in zip(self._groups, self._optimizer.param_groups, strict=True):
            its["lr"] = self._rate(group, number)
        for group in self._signs:
            if number >= round(group.share * self._steps):
                for latents in group.latents:
                    latents.rest()
        self._optimizer.zero_grad(set_to_none=True)
        backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for group in self._signs:
            for latents in group.latents:
                latents.step(self._rate(group, number))

    def _rate(self, group: Group, number: int) -> float:
        return group.lr * _rate(number, round(group.share * self._steps))

    def save(self, work: WorkFolder, stands: TrainingState) -> None:
        """Save the training state."""
        arrays = {"standing": np.array([stands.epochs, stands.best, stands.before], np.float64)}
        for i, parameter in enumerate(self._parameters):
            sums = self._optimizer.state[parameter]  # empty without a gradient: an expert without tokens
            for name, value in {"value": parameter, **sums}.items():
                arrays[f"{name}-{i}"] = value.detach().cpu().numpy()
        for i, latents in enumerate(self._latents):
            arrays |= {f"signs-{name}-{i}": array for name, array in latents.arrays().items()}
        work.save_arrays(_PART, arrays)

    @torch.no_grad()
    def resume(self, work: WorkFolder) -> TrainingState | None:
        """Restore the state that `save` wrote; None if there is none."""
        arrays = work.load_arrays(_PART)
        if arrays is None:
            return None
        for i, parameter in enumerate(self._parameters):
            parameter.copy_(torch.from_numpy(arrays[f"value-{i}"]))
            if f"step-{i}" not in arrays:
                continue
            # AdamW's step count is on the CPU, whatever the parameter's device is.
            self._optimizer.state[parameter] = {
                name: torch.from_numpy(arrays[f"{name}-{i}"]).to("cpu" if name == "step" else parameter.device)
                for name in _SUMS
            }
        for i, latents in enumerate(self._latents):
            names = [name for name in arrays if name.startswith("signs-") and name.endswith(f"-{i}")]
            latents.restore({name.split("-")[1]: arrays[name] for name in names})
        epochs, best, before = arrays["standing"].tolist()
        return TrainingState(epochs=int(epochs), best=best, before=before)


def _rate(step: int, steps: int) -> float:
    """The rate of this step as a share of the peak rate."""
    if step >= steps:
        return 0.0
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
