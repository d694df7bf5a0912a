"""From a fitted matrix to components of the file, and from these back into a running student; torch <-> storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from peraxis_format import Array, Axis, Component, DType, pack_signs
from peraxis_tools.compress.fit.mean import encode_component
from peraxis_tools.compress.fit.scales import Term
from peraxis_tools.compress.fit.signs import unit

__all__ = [
    "TORCH_DTYPES",
    "apply_components",
    "components_of",
    "from_torch",
    "to_torch",
]

TORCH_DTYPES: Final = {
    DType.BF16: torch.bfloat16,
    DType.F16: torch.float16,
    DType.F32: torch.float32,
    DType.F64: torch.float64,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.I16: torch.int16,
    DType.I8: torch.int8,
    DType.U8: torch.uint8,
    DType.BOOL: torch.bool,
    DType.F8_E4M3: torch.float8_e4m3fn,
    DType.F8_E5M2: torch.float8_e5m2,
}
_SWAPPED: Final = {Axis.ROW: Axis.COL, Axis.COL: Axis.ROW}


def to_torch(array: Array, dtype: DType) -> Tensor:
    """A storage array as a tensor that shares its memory."""
    if dtype not in TORCH_DTYPES:
        return torch.from_numpy(array)
    return torch.from_numpy(array).view(TORCH_DTYPES[dtype])


def from_torch(tensor: Tensor, dtype: DType) -> Array:
    """A tensor of this dtype as a storage array."""
    plain = tensor.detach().cpu().contiguous()
    return plain.view(torch.uint16).numpy() if dtype is DType.BF16 else plain.numpy()


def apply_components(base: Tensor, components: Sequence[Component], dtype: torch.dtype) -> Tensor:
    """base + components, in the arithmetic of SPEC 6.1, on the device of base [..., d_out, d_in]."""
    total = base.float()
    for component in components:
        signs = torch.from_numpy(np.ascontiguousarray(component.mask)).to(base.device)
        bits = torch.arange(8, dtype=torch.uint8, device=base.device)
        unpacked = ((signs.unsqueeze(-1) >> bits) & 1).flatten(-2)[..., : base.shape[-1]]
        size: Tensor = torch.ones(1, device=base.device)
        for scale, dimension in ((component.row, -1), (component.col, -2), (component.scalar, None)):
            if scale is not None:
                part = torch.from_numpy(scale.astype(np.float32)).to(base.device)
                size = size * (part if dimension is None else part.unsqueeze(dimension))
        size = size * 2.0**component.exponent
        total = total + unit(unpacked).mul_(size)
    return total.to(dtype)


def components_of(
    matrices: Sequence[Sequence[Term]], *, batch: tuple[int, ...], transposed: bool
) -> tuple[Component, ...]:
    """Components from the terms of each batch element (one element for a 2-D tensor), in storage orientation.

    All elements must have the same axes; one with fewer terms gets scales of zero for the rest.
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


def _nothing(term: Term) -> Term:
    zero = term.axis is Axis.COL
    return replace(
        term,
        row=term.row if zero else torch.zeros_like(term.row),
        col=torch.zeros_like(term.col) if zero else term.col,
    )


def _transpose(term: Term) -> Term:
    if term.axis is Axis.TENSOR:
        size = float(term.row[0])
        return Term(
            axis=term.axis, signs=term.signs.t(), row=torch.full_like(term.col, size), col=torch.ones_like(term.row)
        )
    return Term(axis=_SWAPPED.get(term.axis, term.axis), signs=term.signs.t(), row=term.col, col=term.row)
