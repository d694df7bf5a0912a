"""Multiply a component by a number: the sign goes into the mask, the magnitude into scales and exponent.

    w * b o (row col^T) 2^e  =  (sign(w) b) o (row' col^T) 2^e'        row' 2^e' ~ |w| row 2^e

A power of two goes into the exponent without rounding. Any other weight rounds each scale of one vector (the row's, or
the only one) to F16 once, under a new exponent (SPEC 5.5). With M the largest scale of the vector,

    |folded term - w term| <= 2^-11 |w term|        for scales of at least 2^-28 M
                           <= 2^-39 |w| M |col|     for the rest

so the error of a weighted sum over components is at most sum_k 2^-11 |w_k| (|term_k| + 2^-28 M_k |col_k|).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd

__all__ = ["fold", "negate_mask"]


def negate_mask(mask: NDArray[np.uint8], d_in: int) -> NDArray[np.uint8]:
    """The mask of the opposite signs; unused bits stay zero (SPEC 5.2)."""
    flipped: NDArray[np.uint8] = ~mask
    if d_in % 8:
        flipped[..., -1] &= np.uint8((1 << d_in % 8) - 1)
    return flipped


def fold(component: pxd.Component, weight: float, d_in: int) -> pxd.Component:
    """weight * component, within the bound above.

    Raises ShapeError for a weight that is zero or not finite, or for scales beyond the range of F16 and exponent.
    """
    if not math.isfinite(weight) or weight == 0.0:
        raise pxd.ShapeError(f"a component cannot be folded with the weight {weight}")
    if weight < 0.0:
        component = replace(component, mask=negate_mask(component.mask, d_in))
    fraction, power = math.frexp(abs(weight))
    if fraction == 0.5 and pxd.EXPONENT_MIN <= component.exponent + power - 1 <= pxd.EXPONENT_MAX:
        return replace(component, exponent=component.exponent + power - 1)
    return _scaled(component, abs(weight))


def _scaled(component: pxd.Component, weight: float) -> pxd.Component:
    """The component with its first scale vector times weight, rounded under a new exponent."""
    name, scale = next(iter(component.scales().items()))
    rounded, shift = pxd.encode_scales(scale.astype(np.float64) * weight)
    exponent = min(max(component.exponent + shift, pxd.EXPONENT_MIN), pxd.EXPONENT_MAX)
    rest = component.exponent + shift - exponent
    if rest:
        with np.errstate(over="ignore"):
            rounded = np.ldexp(scale.astype(np.float64) * weight, -(shift - rest)).astype(np.float16)
        if not np.all(np.isfinite(rounded)):
            raise pxd.ShapeError(f"the weight {weight} gives scales beyond the range of F16 and an exponent of 63")
    changed: dict[str, Any] = {name: rounded}
    return replace(component, exponent=exponent, **changed)
