"""NaN and infinite weights: every server of a chain would serve them, so a trainer says that it publishes some.

The check reads each new tensor once more, at about the speed of a copy: under a thirtieth of the time of a step.
"""

from __future__ import annotations

import logging
import math
from typing import Final, Literal, TypeAlias, get_args

import torch

from peraxis_format.arguments import check_choice
from peraxis_format.dtypes import Array, DType
from peraxis_format.errors import LiveModelError
from peraxis_format.ops.tensors import from_storage

__all__ = ["FiniteCheck", "Nonfinite"]

_LOGGER: Final = logging.getLogger("peraxis")

Nonfinite: TypeAlias = Literal["warn", "refuse"]


class FiniteCheck:
    """What is done about weights that are NaN or infinite: a warning, once, or LiveModelError each time."""

    def __init__(self, nonfinite: Nonfinite) -> None:
        """Raises ArgumentError for another word."""
        check_choice("nonfinite", nonfinite, get_args(Nonfinite))
        self._refuses = nonfinite == "refuse"
        self._told = False

    def check(self, name: str, weights: Array, dtype: DType) -> None:
        """Check weights of a tensor that are about to be published: a storage array of any shape."""
        if not dtype.is_float or self._told or not weights.size:
            return
        values = from_storage(weights, dtype)
        if all(math.isfinite(end) for end in map(float, torch.aminmax(values))):  # NaN is both
            return
        bad = values.numel() - int(values.isfinite().sum())
        found = f"{name}: {bad} of {values.numel()} weights to publish are NaN or infinite in {dtype.value}"
        if self._refuses:
            raise LiveModelError(f"{found}; nothing is published (nonfinite='refuse')")
        self._told = True
        _LOGGER.warning(
            "%s, and servers will serve them; nonfinite='refuse' makes such a step an error. This is said once", found
        )
