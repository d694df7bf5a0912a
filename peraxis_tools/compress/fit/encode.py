"""The last step of every fit: a mask and float64 scales become a component of the file, with scales in F16."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from peraxis_format import Axis, Component, encode_scale_pair, encode_scales

__all__ = ["encode_component"]


def encode_component(
    mask: NDArray[np.uint8],
    row: NDArray[np.floating],
    col: NDArray[np.floating],
    *,
    axis: Axis,
    batch: tuple[int, ...],
) -> Component:
    """Round the scales to F16 under one exponent (SPEC 5.5).

    mask: U8 [B, d_out, bytes]; row: [B, d_out]; col: [B, d_in]; both >= 0.

    `tensor` takes its scalar from row[0, 0]; a vector that the axis does not have is ignored.
    """
    shape = (*batch, *mask.shape[1:])
    packed = np.ascontiguousarray(mask.reshape(shape))
    if axis is Axis.TENSOR:
        scalar, exponent = encode_scales(row.reshape(-1)[:1])
        return Component(axis=axis, exponent=exponent, mask=packed, scalar=scalar)
    if axis is Axis.ROW:
        row16, exponent = encode_scales(row.reshape(*batch, -1))
        return Component(axis=axis, exponent=exponent, mask=packed, row=row16)
    if axis is Axis.COL:
        col16, exponent = encode_scales(col.reshape(*batch, -1))
        return Component(axis=axis, exponent=exponent, mask=packed, col=col16)
    row16, col16, exponent = encode_scale_pair(row.reshape(*batch, -1), col.reshape(*batch, -1))
    return Component(axis=axis, exponent=exponent, mask=packed, row=row16, col=col16)
