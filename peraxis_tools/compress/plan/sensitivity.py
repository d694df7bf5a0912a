"""The Fisher errors of budget.py: the cost in KL of each number of masks of each module, from backward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
from peraxis_tools.compress.model.weights import Weights, kept_rows
from peraxis_tools.compress.plan.budget import MASKS_MAX, module_terms
from peraxis_tools.compress.plan.plan import PlannedModule

__all__ = ["fisher_errors"]


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

    This needs memory for the gradients of all weights for one sample, and for all dense components of one module. A
    module that is in no parameter of the model is left out.
    """
    found = [(m, weights.names.by_tensor[m.name]) for m in modules if m.name in weights.names.by_tensor]
    parameters = {piece.parameter: teacher.get(piece.parameter) for _, piece in found}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    sums = {module.name: [0.0] * (MASKS_MAX + 1) for module, _ in found}
    generator = torch.Generator(device=samples.device).manual_seed(seed)
    held = [(module, piece, *_terms_on(module, weights, samples.device)) for module, piece in found]
    for i, ids in enumerate(samples):
        progress("sensitivity", i, len(samples))
        logits = teacher.model(input_ids=ids[None], use_cache=False).logits.float()[0]
        log_p = torch.log_softmax(logits, dim=-1)
        with torch.no_grad():
            drawn = torch.multinomial(log_p.exp(), 1, generator=generator)
        grads = torch.autograd.grad(log_p.gather(1, drawn).sum(), list(parameters.values()), allow_unused=True)
        by_name = dict(zip(parameters, grads, strict=True))
        for module, piece, delta, terms in held:
            gradient = by_name[piece.parameter]
            if gradient is None:
                continue
            part = piece.select(gradient)[: kept_rows(module)]
            product = float((part * delta).sum(dtype=torch.float64))
            for k in range(MASKS_MAX + 1):
                if 0 < k <= len(terms):
                    product -= float((part * terms[k - 1]).sum(dtype=torch.float64))
                sums[module.name][k] += 0.5 * product * product / ids.numel()
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    progress("sensitivity", len(samples), len(samples))
    return {name: [value / len(samples) for value in values] for name, values in sums.items()}


def _terms_on(module: PlannedModule, weights: Weights, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    terms, delta, _ = module_terms(module, weights.base, weights.fine_tuned)
    return torch.from_numpy(delta).to(device), [torch.from_numpy(term).to(device) for term in terms]
