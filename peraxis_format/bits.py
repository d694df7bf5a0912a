"""Sign masks: one bit a weight, least significant bit first along d_in (SPEC 5.1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from peraxis_format.errors import ShapeError

__all__ = ["mask_width", "pack_signs", "unpack_signs", "unused_bits_are_zero"]


def mask_width(d_in: int) -> int:
    """Bytes of one row of a mask: ceil(d_in / 8)."""
    return (d_in + 7) // 8


def pack_signs(signs: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Pack signs along the last axis, least significant bit first (SPEC 5.1).

    signs: [..., d_out, d_in]; True is +1. Returns [..., d_out, ceil(d_in / 8)], unused bits 0.
    Raises ShapeError if signs has fewer than two dimensions. Law: unpack_signs(pack_signs(s), d_in) == s.
    """
    if signs.ndim < 2:
        raise ShapeError(f"signs need at least two dimensions, not {signs.ndim}")
    return np.packbits(signs, axis=-1, bitorder="little")


def unpack_signs(mask: NDArray[np.uint8], d_in: int) -> NDArray[np.bool_]:
    """Unpack a mask to signs; the inverse of pack_signs.

    mask: [..., d_out, ceil(d_in / 8)]. Returns [..., d_out, d_in]; True is +1. Unused bits are ignored.
    Raises ShapeError if the width of the mask is not that of d_in.
    """
    if mask.shape[-1] != mask_width(d_in):
        raise ShapeError(f"a mask of {mask.shape[-1]} bytes per row does not match {d_in} weights")
    return np.unpackbits(mask, axis=-1, count=d_in, bitorder="little").view(np.bool_)


def unused_bits_are_zero(mask: NDArray[np.uint8], d_in: int) -> bool:
    """Whether the bits beyond d_in in each row's last byte are 0 (SPEC 5.2)."""
    used = d_in % 8
    return used == 0 or not np.any(mask[..., -1] >> np.uint8(used))
