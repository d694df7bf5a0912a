"""NaN and infinite weights: every server of a chain would serve them, so a trainer says that it publishes some.

A tensor may hold infinities on purpose (a mask that is a buffer), so each tensor is named once, and some others later.

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
_MOST: Final = 4  # tensors that are named

Nonfinite: TypeAlias = Literal["warn", "refuse"]


class FiniteCheck:
    """What is done about weights that are NaN or infinite: a warning for a tensor, or LiveModelError each time."""

    def __init__(self, nonfinite: Nonfinite) -> None:
        """Raises ArgumentError for another word."""
        check_choice("nonfinite", nonfinite, get_args(Nonfinite))
        self._refuses = nonfinite == "refuse"
        self._told: set[str] = set()

    def check(self, name: str, weights: Array, dtype: DType) -> None:
        """Check weights of a tensor that are about to be published: a storage array of any shape."""
        if not dtype.is_float or name in self._told or len(self._told) == _MOST or not weights.size:
            return
        values = from_storage(weights, dtype)
        if all(math.isfinite(end) for end in map(float, torch.aminmax(values))):  # NaN is both
            return
        bad = values.numel() - int(values.isfinite().sum())
        found = f"{name}: {bad} of {values.numel()} weights to publish are NaN or infinite in {dtype.value}"
        if self._refuses:
            raise LiveModelError(f"{found}; nothing is published (nonfinite='refuse')")
        self._told.add(name)
        _LOGGER.warning(
            "%s, and servers will serve them; nonfinite='refuse' makes such a step an error. This is said once for "
            "each tensor, and for %d tensors at most",
            found,
            _MOST,
        )
