"""The errors of budget.py where there is a text: the cost in KL of each number of masks, from backward passes.

Let Delta_k be what a fit with k masks leaves of a module's delta D. To second order, with labels y sampled from the
fine-tuned model itself, its cost in KL(fine-tuned || compressed), in nats, is

    KL_k = 1/2 E[ <dW, Delta_k>^2 ]      dW = gradient of log p(y | x) of a sample in the weight        (Fisher)

One backward pass for each sample through the fine-tuned model gives this for all modules of any architecture,
embeddings and lm_head included. The fit itself comes later, so Delta_k = D - f_k (Q_1 + .. + Q_k) with the signs and
mean magnitudes Q_j of the delta and the f_k of least cost: mean magnitudes alone leave up to five times of what a fit
leaves where the fine-tune hardly moved. Fits lower the errors further, by similar factors. A few masks are measured,
and further ones extrapolated (price.py).

Memory holds the model, its gradients of one sample, and the packed masks of all modules, one bit per weight and mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peraxis_format import Component, unpack_signs
from peraxis_tools.compress.fit.mean import mean_components
from peraxis_tools.compress.fit.signs import unit
from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
from peraxis_tools.compress.model.weights import Weights, kept_rows
from peraxis_tools.compress.plan.plan import PlannedModule
from peraxis_tools.compress.plan.price import MEASURED_MASKS, extended
from peraxis_tools.compress.plan.unchanged import is_unchanged
from peraxis_tools.parameter_names import ParameterSlice

__all__ = ["fisher_errors", "fitted_errors", "inner_products"]

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
    products: dict[str, list[list[float]]] = {module.name: [] for module, _ in found}
    generator = torch.Generator(device=samples.device).manual_seed(seed)
    held = [(module, piece, _components(module, weights)) for module, piece in found]
    for i, ids in enumerate(samples):
        progress("sensitivity", i, len(samples))
        gradients = dict(zip(parameters, _gradients(teacher, ids, list(parameters.values()), generator), strict=True))
        for module, piece, components in held:
            products[module.name].append(_products(gradients[piece.parameter], module, piece, components, weights))
        gradients.clear()  # memory has those of one sample at a time
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    progress("sensitivity", len(samples), len(samples))
    scale = 0.5 / samples.shape[1]
    return {name: extended([scale * error for error in fitted_errors(np.array(its))]) for name, its in products.items()}


def fitted_errors(products: NDArray[np.float64]) -> list[float]:
    """The mean over samples of <gradient, D - f_k (Q_1 + .. + Q_k)>^2 with the best f_k for each k.

    products: of `inner_products`, [samples, 1 + masks].
    """
    whole = products[:, 0]
    found = [float(np.square(whole).mean())]
    for left in products.T[1:]:
        along = whole - left
        power = float(along @ along)
        factor = float(whole @ along) / power if power > 0.0 else 0.0
        found.append(float(np.square(whole - factor * along).mean()))
    return found


def _components(module: PlannedModule, weights: Weights) -> tuple[Component, ...]:
    """Signs and mean magnitudes of a few masks; () for an unchanged module."""
    rows = slice(0, kept_rows(module))
    base, tuned = weights.base.read(module.name, rows), weights.fine_tuned.read(module.name, rows)
    base_dtype = weights.base[module.name].dtype
    if is_unchanged(base, tuned, base_dtype=base_dtype, dtype=module.dtype):
        return ()
    return mean_components(
        base, tuned, base_dtype=base_dtype, dtype=module.dtype, axis=module.axis, components=MEASURED_MASKS
    )


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
    """`inner_products`; zeros where nothing depends on the parameter."""
    if gradient is None or not components:
        return [0.0] * (len(components) + 1)
    base, tuned = weights.pair(module)
    return inner_products(piece.select(gradient)[: kept_rows(module)], tuned - base, components)


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
