"""Components of a variant as they are held in memory: as many bytes as in the file, with scales in F16.

Kernels take scales in binary32, which in a small model are a twelfth of a variant. So they are made for each product,
and only masks and F16 scales stay. On an accelerator the binary32 scales stay too: making them costs two launches, and
in the models served there they are a hundredth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peraxis_format.bits import pack_signs, unpack_signs
from peraxis_format.delta import Component
from peraxis_format.engines.vllm.bridge import ComponentTensors

__all__ = ["HeldComponent"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class HeldComponent:
    """A component of a matrix [d_out, d_in] (SPEC 5.3).

    mask: uint8 [d_out, ceil(d_in/8)]. row: float16 [d_out]; col: float16 [d_in]; None if the axis has none. scale:
    float32 [1], 2^e times the scalar, shared by equal ones. width: d_in. made: the result of `wide`, if it stays.
    """

    mask: Tensor
    row: Tensor | None
    col: Tensor | None
    scale: Tensor
    width: int
    made: ComponentTensors | None = None

    @classmethod
    def of(cls, component: Component, box: Sequence[tuple[int, int]], width: int) -> HeldComponent:
        """A copy of a box of a matrix's component. box: [begin, end) of rows and columns. width: d_in of the matrix."""
        rows, columns = slice(*box[0]), slice(*box[1])
        mask = component.mask[rows]
        if tuple(box[1]) != (0, width):
            mask = pack_signs(unpack_signs(mask, width)[:, columns])
        return cls(
            mask=_copied(mask),
            row=None if component.row is None else _copied(component.row[rows]),
            col=None if component.col is None else _copied(component.col[columns]),
            scale=_scale(component.exponent, 1.0 if component.scalar is None else float(component.scalar[0])),
            width=columns.stop - columns.start,
        )

    @property
    def nbytes(self) -> int:
        """The bytes in memory."""
        own = [self.mask, self.row, self.col]
        made = [] if self.made is None else [self.made.row, self.made.col]
        return sum(tensor.nbytes for tensor in own + made if tensor is not None)

    def wide(self) -> ComponentTensors:
        """The component for kernels: the same mask, and scales in binary32, which are exact (SPEC 6.1)."""
        if self.made is not None:
            return self.made
        row = self.scale.expand(len(self.mask)).contiguous() if self.row is None else self.scale * self.row
        col = torch.ones(self.width, device=self.mask.device) if self.col is None else self.col.float()
        return ComponentTensors(self.mask, row, col, self.col is None)

    def to(self, device: torch.device) -> HeldComponent:
        """The component on this device."""
        row, col = (None if scales is None else scales.to(device) for scales in (self.row, self.col))
        moved = replace(self, mask=self.mask.to(device), row=row, col=col, scale=self.scale.to(device))
        return moved if device.type == "cpu" else replace(moved, made=moved.wide())


@lru_cache(maxsize=1024)
def _scale(exponent: int, scalar: float) -> Tensor:
    return torch.full((1,), 2.0**exponent * scalar, dtype=torch.float32)


def _copied(array: NDArray[Any]) -> Tensor:
    """A copy in memory of torch's own, without a numpy array beside it."""
    return torch.tensor(np.ascontiguousarray(array))
