"""Turn fitted matrices into components of the file, and apply components to a running student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from peraxis_format import Axis, Component, pack_signs
from peraxis_format.ops.rebuild import rebuild_tensor
from peraxis_format.ops.rebuild.torch import ComponentTensors
from peraxis_tools.compress.fit.encode import encode_component
from peraxis_tools.compress.fit.scales import ComponentFit

__all__ = ["apply_components", "components_of"]

_SWAPPED: Final = {Axis.ROW: Axis.COL, Axis.COL: Axis.ROW}


def apply_components(base: Tensor, components: Sequence[Component], dtype: torch.dtype) -> Tensor:
    """base + components as SPEC 6 computes them, on the device of base [..., d_out, d_in]."""
    if not components:
        return base if base.dtype == dtype else base.float().to(dtype)
    shape = tuple(base.shape)
    each = [component.factors(shape) for component in components]
    matrices = base.reshape(-1, *shape[-2:])
    out = torch.empty(matrices.shape, dtype=dtype, device=base.device)
    for e, matrix in enumerate(matrices):
        tensors = [ComponentTensors.of(factors[e], base.device) for factors in each]
        rebuild_tensor(matrix, tensors, out=out[e])
    return out.reshape(shape)


def components_of(
    matrices: Sequence[Sequence[ComponentFit]], *, batch: tuple[int, ...], transposed: bool
) -> tuple[Component, ...]:
    """Components from the fitted components of each batch element (one for a 2-D tensor), in storage orientation.

    All elements must have the same axes; an element with fewer components gets scales of zero for the rest.
    """
    count = max(len(terms) for terms in matrices)
    longest = next(terms for terms in matrices if len(terms) == count)
    components = []
    for k in range(count):
        terms = [terms[k] if k < len(terms) else _nothing(longest[k]) for terms in matrices]
        if transposed:
            terms = [_transpose(term) for term in terms]
        mask = np.stack([pack_signs(term.signs.cpu().numpy()) for term in terms])
        row = np.stack([term.row.double().cpu().numpy() for term in terms])
        col = np.stack([term.col.double().cpu().numpy() for term in terms])
        components.append(encode_component(mask, row, col, axis=terms[0].axis, batch=batch))
    return tuple(components)


def _nothing(term: ComponentFit) -> ComponentFit:
    zero = term.axis is Axis.COL
    return replace(
        term,
        row=term.row if zero else torch.zeros_like(term.row),
        col=torch.zeros_like(term.col) if zero else term.col,
    )


def _transpose(term: ComponentFit) -> ComponentFit:
    if term.axis is Axis.TENSOR:
        size = float(term.row[0])
        return ComponentFit(
            axis=term.axis, signs=term.signs.t(), row=torch.full_like(term.col, size), col=torch.ones_like(term.row)
        )
    return ComponentFit(axis=_SWAPPED.get(term.axis, term.axis), signs=term.signs.t(), row=term.col, col=term.row)
