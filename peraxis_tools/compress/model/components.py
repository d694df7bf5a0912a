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
    count = max(map(len, matrices))
    longest = next(fits for fits in matrices if len(fits) == count)
    components = []
    for k in range(count):
        kth = [fits[k] if k < len(fits) else _nothing(longest[k]) for fits in matrices]
        if transposed:
            kth = [_transpose(fit) for fit in kth]
        mask = np.stack([pack_signs(fit.signs.cpu().numpy()) for fit in kth])
        row = np.stack([fit.row.double().cpu().numpy() for fit in kth])
        col = np.stack([fit.col.double().cpu().numpy() for fit in kth])
        components.append(encode_component(mask, row, col, axis=kth[0].axis, batch=batch))
    return tuple(components)


def _nothing(fit: ComponentFit) -> ComponentFit:
    zero = fit.axis is Axis.COL
    return replace(
        fit,
        row=fit.row if zero else torch.zeros_like(fit.row),
        col=torch.zeros_like(fit.col) if zero else fit.col,
    )


def _transpose(fit: ComponentFit) -> ComponentFit:
    if fit.axis is Axis.TENSOR:
        size = float(fit.row[0])
        return ComponentFit(
            axis=fit.axis, signs=fit.signs.t(), row=torch.full_like(fit.col, size), col=torch.ones_like(fit.row)
        )
    return ComponentFit(axis=_SWAPPED.get(fit.axis, fit.axis), signs=fit.signs.t(), row=fit.col, col=fit.row)
