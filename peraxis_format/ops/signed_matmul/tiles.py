"""The rows of a batch, sorted for the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Tiles"]


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Rows sorted by variant, in tiles of one variant and at most `height` rows (triton.py).

    order: int32 [rows]. tiles: int32 [tiles, 3].
    """

    order: Tensor
    tiles: Tensor
    height: int
