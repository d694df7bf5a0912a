"""The errors of budget.py where there is a text: the cost in KL of each number of masks, from backward passes.

Let Delta_k be what a fit with k masks leaves of a module's delta D. To second order, with labels y sampled from the
fine-tuned model itself, its cost in KL(fine-tuned || compressed), in nats, is

    KL_k = 1/2 E[ <dW, Delta_k>^2 ]      dW = gradient of log p(y | x) of a sample in the weight        (Fisher)

One backward pass for each sample through the fine-tuned model gives this for all modules of any architecture,
embeddings and lm_head included. The mean is over passes, so samples are cut into pieces: as many tokens in three times
the passes lower the KL of the demo pair at 4 times smaller from 0.0012 to 0.0004.

The fit itself comes later, so Delta_k = D - f_k (Q_1 + .. + Q_k) with the signs and mean magnitudes Q_j of the delta
and the f_k of least cost: mean magnitudes alone leave up to five times of what a fit leaves where the fine-tune hardly
moved. Fits lower the errors further, by similar factors. A few masks are measured, and further ones extrapolated
(price.py). The text may read nothing of a change, such as that of a few tokens' rows. It still costs something: _UNREAD
of the least cost that was measured, so that the module gets a mask if there is room.

Memory holds the model, one gradient at a time, and the packed masks of all modules, one bit per weight and mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peraxis_format import Component, unpack_signs
from peraxis_tools.checkpoints.parameter_names import ParameterSlice
from peraxis_tools.compress.fit.mean import mean_components
from peraxis_tools.compress.fit.signs import unit
from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
from peraxis_tools.compress.model.weights import Weights, kept_rows
from peraxis_tools.compress.plan.estimate import sensitivity_pieces
from peraxis_tools.compress.plan.plan import PlannedModule
from peraxis_tools.compress.plan.price import MEASURED_MASKS, extended, shares_left
from peraxis_tools.compress.plan.unchanged import is_unchanged
from peraxis_tools.process.heap import trim_heap
from peraxis_tools.texts.samples import Ids

__all__ = ["fisher_errors", "fitted_errors", "in_pieces", "inner_products"]

_UNREAD: Final = 1e-3
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
    held = [
        _Held(module=module, piece=weights.names.by_tensor[module.name], components=_components(module, weights))
        for module in modules
        if module.name in weights.names.by_tensor
    ]
    products = {its.module.name: np.zeros((len(samples), 1 + len(its.components))) for its in held}
    generator = torch.Generator(device=samples.device).manual_seed(seed)
    for i, ids in enumerate(samples):
        progress("sensitivity", i, len(samples))

        def add(its: _Held, gradient: Tensor, sample: int = i) -> None:
            products[its.module.name][sample] += _products(gradient, its, weights)

        with _gradients_used(teacher, held, add):
            _backward(teacher, ids[None], generator)
        trim_heap()
    progress("sensitivity", len(samples), len(samples))
    scale = 0.5 / samples.shape[1]
    errors = {name: extended([scale * error for error in fitted_errors(its)]) for name, its in products.items()}
    least = min((its[0] for its in errors.values() if its[0] > 0.0), default=1.0)
    for its in held:
        if its.components and not errors[its.module.name][0] > 0.0:
            shares = shares_left(its.module, weights.base, weights.fine_tuned)
            errors[its.module.name] = [_UNREAD * least * share for share in shares]
    return errors


def in_pieces(ids: Ids) -> Ids:
    """Samples int64 [n, length] as shorter ones, [n * pieces, length // pieces]; the rest of each is left out."""
    pieces = sensitivity_pieces(*ids.shape)
    length = ids.shape[1] // pieces
    return np.ascontiguousarray(ids[:, : pieces * length].reshape(-1, length))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A module, its place in the model, and signs and mean magnitudes of a few masks (none if it is unchanged)."""

    module: PlannedModule
    piece: ParameterSlice
    components: tuple[Component, ...]


@contextmanager
def _gradients_used(
    teacher: LayerwiseModel, held: Sequence[_Held], use: Callable[[_Held, Tensor], None]
) -> Iterator[None]:
    """In a backward pass inside this context each gradient goes to `use`, and is freed.

    A parameter's gradient may come in several parts, one from each backward pass.
    """
    by_parameter: dict[Tensor, list[_Held]] = {}
    for its in held:
        by_parameter.setdefault(teacher.get(its.piece.parameter), []).append(its)

    def used(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        for its in by_parameter[parameter]:
            use(its, gradient)
        parameter.grad = None

    handles = []
    for parameter in by_parameter:
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(used))
    try:
        yield
    finally:
        for parameter, handle in zip(by_parameter, handles, strict=True):
            handle.remove()
            parameter.requires_grad_(False)


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


def _backward(teacher: LayerwiseModel, ids: Tensor, generator: torch.Generator) -> None:
    """The gradients of the sum over a sample's tokens of log p(y | x), y drawn from the model itself."""
    states = teacher.states(ids)
    given = states.detach().requires_grad_()
    for tokens in teacher.token_ranges(ids, states):
        log_p = torch.log_softmax(teacher.head(ids[:, tokens], given[:, tokens]).float()[0], dim=-1)
        with torch.no_grad():
            drawn = torch.multinomial(log_p.exp(), 1, generator=generator)
        log_p.gather(1, drawn).sum().backward()
    if states.requires_grad:  # otherwise no layer has a module
        states.backward(given.grad)


def _products(gradient: Tensor, its: _Held, weights: Weights) -> list[float]:
    """`inner_products` of a module."""
    if not its.components:
        return [0.0]

    def delta(rows: slice) -> Tensor:
        base, tuned = (weights.read(side, its.module.name, rows).float() for side in (weights.base, weights.fine_tuned))
        return tuned - base

    covered = its.piece.select(gradient)[: kept_rows(its.module)]
    if covered.dim() == 2:
        return inner_products(covered, lambda _, rows: delta(rows), its.components)
    matrices = delta(slice(0, len(covered))).flatten(0, -3)
    return inner_products(covered, lambda e, rows: matrices[e, rows], its.components)


@torch.no_grad()
def inner_products(
    gradient: Tensor, delta: Callable[[int, slice], Tensor], components: Sequence[Component]
) -> list[float]:
    """<gradient, residual of the delta> with the first 0, 1, 2, ... components.

    gradient: [..., d_out, d_in]. delta: the float32 rows [rows, d_in] of a matrix of the batch.
    """
    shape = tuple(gradient.shape)
    d_out, d_in = shape[-2:]
    gradients = gradient.reshape(-1, d_out, d_in)
    factors = [component.factors(shape) for component in components]
    whole, terms = 0.0, [0.0] * len(components)
    step = max(1, _CHUNK // d_in)
    for e, matrix in enumerate(gradients):
        for start in range(0, d_out, step):
            rows = slice(start, min(start + step, d_out))
            chunk = matrix[rows].float()
            whole += float(torch.sum(chunk * delta(e, rows), dtype=torch.float64))
            for k, each in enumerate(factors):
                row, col = (torch.from_numpy(v).to(chunk.device) for v in (each[e].row[rows], each[e].col))
                signs = unit(torch.from_numpy(unpack_signs(each[e].mask[rows], d_in)).to(chunk.device))
                terms[k] += float((signs.mul_(chunk) @ col).double() @ row.double())
    found = [whole]
    for term in terms:
        found.append(found[-1] - term)
    return found
