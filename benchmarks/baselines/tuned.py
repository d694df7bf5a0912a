"""The paper's procedure with tuned learning rates. The tuning text is neither a fitting text nor an evaluation text.

A search starts at the paper's rate and goes up by factors of about three while the KL divergence on the tuning text
falls. The first search tunes one rate for the fits of rows and columns. The second tunes the rate of the distillation
from the best fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from baselines.distill import distill
from baselines.pair import Pair, SignedLinear
from baselines.paper import PaperSettings, fit_modules
from peraxis_tools.evaluate.fidelity import compare

__all__ = ["paper_tuned"]

T = TypeVar("T")
Modules = dict[str, SignedLinear]
_PATIENCE = 1  # number of rates without an improvement that the search accepts


def paper_tuned(
    load: Callable[[], Pair], fit_ids: Tensor, validation_ids: Tensor, distill_ids: Tensor, tuning_ids: Tensor
) -> tuple[Modules, PaperSettings]:
    """Return the best modules and their settings. load: returns a new pair, because a fit changes the student.

    The ids are int64 [samples, length].
    """

    def fit(lr: float) -> tuple[Pair, Modules]:
        pair = load()
        return pair, fit_modules(pair, fit_ids, validation_ids, PaperSettings(row_lr=lr, col_lr=lr))

    fit_lr, (pair, fitted) = _climb(fit, _rates(1e-4), lambda found: _kl(*found, tuning_ids))

    def distilled(lr: float) -> Modules:
        modules = copy.deepcopy(fitted)
        distill(pair, modules, distill_ids, lr=lr, epochs=PaperSettings().distill_epochs)
        return modules

    distill_lr, best = _climb(distilled, _rates(1e-5), lambda modules: _kl(pair, modules, tuning_ids))
    return best, replace(PaperSettings(), row_lr=fit_lr, col_lr=fit_lr, distill_lr=distill_lr)


def _rates(first: float) -> Iterator[float]:
    lr = first
    while lr < 0.2:
        yield lr
        yield 3 * lr
        lr *= 10


def _climb(attempt: Callable[[float], T], rates: Iterator[float], judge: Callable[[T], float]) -> tuple[float, T]:
    best: tuple[float, float, T] | None = None
    worse = 0
    for lr in rates:
        found = attempt(lr)
        error = judge(found)
        if best is None or error < best[0]:
            best, worse = (error, lr, found), 0
        else:
            worse += 1
            if worse > _PATIENCE:
                break
    if best is None:
        raise ValueError("no learning rate to try")
    return best[1], best[2]


@torch.no_grad()
def _kl(pair: Pair, modules: Modules, ids: Tensor) -> float:
    for name, module in modules.items():
        pair.student.get_submodule(name).weight.copy_(module.weight())
    return compare(pair.teacher, pair.student, ids.split(8)).kl
