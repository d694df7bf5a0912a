"""The Fisher errors of budget.py: the cost in KL of each number of masks of each module, from backward passes.

Memory holds the model, its gradients of one sample, and the packed masks of all modules, one bit per weight; dense
components would take 36 bytes per weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from peraxis_format import Component, unpack_signs
from peraxis_tools.compress.fit.signs import unit
from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
from peraxis_tools.compress.model.weights import Weights, kept_rows
from peraxis_tools.compress.plan.budget import MASKS_MAX, module_terms
from peraxis_tools.compress.plan.plan import PlannedModule
from peraxis_tools.parameter_names import ParameterSlice

__all__ = ["fisher_errors", "inner_products"]

_CHUNK: Final = 1 << 20  # weights to unpack at a time


def fisher_errors(
    teacher: LayerwiseModel,
    weights: Weights,
    modules: Sequence[PlannedModule],
    samples: Tensor,
    *,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, list[float]]:
    """KL_mk in nats per token, for 0 to 8 masks, by module. teacher: a filled model; samples: ids [n, length].

    A module that is in no parameter of the model is left out.
    """
    found = [(m, weights.names.by_tensor[m.name]) for m in modules if m.name in weights.names.by_tensor]
    parameters = {piece.parameter: teacher.get(piece.parameter) for _, piece in found}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    sums = {module.name: np.zeros(MASKS_MAX + 1) for module, _ in found}
    generator = torch.Generator(device=samples.device).manual_seed(seed)
    held = [(module, piece, module_terms(module, weights.base, weights.fine_tuned)[0]) for module, piece in found]
    for i, ids in enumerate(samples):
        progress("sensitivity", i, len(samples))
        gradients = dict(zip(parameters, _gradients(teacher, ids, list(parameters.values()), generator), strict=True))
        for module, piece, components in held:
            products = _products(gradients[piece.parameter], module, piece, components, weights)
            sums[module.name] += 0.5 / ids.numel() * np.square(products)
        gradients.clear()  # memory has those of one sample at a time
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    progress("sensitivity", len(samples), len(samples))
    return {name: (values / len(samples)).tolist() for name, values in sums.items()}


def _gradients(
    teacher: LayerwiseModel, ids: Tensor, parameters: Sequence[Tensor], generator: torch.Generator
) -> tuple[Tensor | None, ...]:
    """Of the sum over a sample's tokens of log p(y | x), y drawn from the model itself; None: it does not depend."""
    logits = teacher.model(input_ids=ids[None], use_cache=False).logits.float()[0]
    log_p = torch.log_softmax(logits, dim=-1)
    with torch.no_grad():
        drawn = torch.multinomial(log_p.exp(), 1, generator=generator)
    return torch.autograd.grad(log_p.gather(1, drawn).sum(), list(parameters), allow_unused=True)


def _products(
    gradient: Tensor | None,
    module: PlannedModule,
    piece: ParameterSlice,
    components: Sequence[Component],
    weights: Weights,
) -> list[float]:
    """`inner_products` for 0 to 8 masks."""
    if gradient is None:
        return [0.0] * (MASKS_MAX + 1)
    base, tuned = weights.pair(module)
    found = inner_products(piece.select(gradient)[: kept_rows(module)], tuned - base, components)
    return found + [found[-1]] * (MASKS_MAX + 1 - len(found))


@torch.no_grad()
def inner_products(gradient: Tensor, delta: Tensor, components: Sequence[Component]) -> list[float]:
    """<gradient, residual of the delta> with the first 0, 1, 2, ... components.

    gradient, delta: [..., d_out, d_in] of one shape.
    """
    shape = tuple(delta.shape)
    d_out, d_in = shape[-2:]
    gradients, deltas = (value.reshape(-1, d_out, d_in) for value in (gradient, delta))
    factors = [component.factors(shape) for component in components]
    whole, parts = 0.0, [0.0] * len(components)
    step = max(1, _CHUNK // d_in)
    for e in range(len(deltas)):
        for start in range(0, d_out, step):
            rows = slice(start, start + step)
            chunk = gradients[e, rows].float()
            whole += float(torch.sum(chunk * deltas[e, rows], dtype=torch.float64))
            for k, each in enumerate(factors):
                row, col = (torch.from_numpy(v).to(chunk.device) for v in (each[e].row[rows], each[e].col))
                signs = unit(torch.from_numpy(unpack_signs(each[e].mask[rows], d_in)).to(chunk.device))
                parts[k] += float((signs.mul_(chunk) @ col).double() @ row.double())
    found = [whole]
    for part in parts:
        found.append(found[-1] - part)
    return found
