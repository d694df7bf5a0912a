"""Components of a variant as they are held in memory: as many bytes as in the file, with scales in F16.

Kernels take scales in binary32, which in a small model are a twelfth of a variant. So they are made for each product,
and only masks and F16 scales stay. On an accelerator the binary32 scales stay too: making them costs two launches, and
in the models served there they are a hundredth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from peraxis_format.bits import pack_signs, unpack_signs
from peraxis_format.delta import Axis, Component
from peraxis_format.engines.vllm.bridge import ComponentTensors

__all__ = ["HeldComponent"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class HeldComponent:
    """A component of a matrix [d_out, d_in] (SPEC 5.3).

    mask: uint8 [d_out, ceil(d_in/8)]. width: d_in. scales: float16, those of the rows, then those of the columns, as
    far as the axis has them: one tensor, because each takes half a kilobyte beside its data. factor: float32 [1], 2^e
    times the scalar, shared by equal ones. made: the result of `wide`, if it stays.
    """

    axis: Axis
    mask: Tensor
    width: int
    scales: Tensor
    factor: Tensor
    made: ComponentTensors | None = None

    @classmethod
    def of(cls, component: Component, box: Sequence[tuple[int, int]], width: int) -> HeldComponent:
        """A copy of a box of a matrix's component. box: [begin, end) of rows and columns. width: d_in of the matrix."""
        rows, columns = slice(*box[0]), slice(*box[1])
        mask = component.mask[rows]
        if tuple(box[1]) != (0, width):
            mask = pack_signs(unpack_signs(mask, width)[:, columns])
        scales = np.empty(0, np.float16)
        for values, part in ((component.row, rows), (component.col, columns)):
            if values is not None:
                scales = np.concatenate([scales, values[part]])
        return cls(
            axis=component.axis,
            mask=torch.tensor(np.ascontiguousarray(mask)),
            width=columns.stop - columns.start,
            scales=torch.tensor(scales),
            factor=_factor(component.exponent, 1.0 if component.scalar is None else float(component.scalar[0])),
        )

    @property
    def nbytes(self) -> int:
        """The bytes in memory."""
        made = 0 if self.made is None else self.made.row.nbytes + self.made.col.nbytes
        return self.mask.nbytes + self.scales.nbytes + made

    def wide(self) -> ComponentTensors:
        """The component for kernels: the same mask, and scales in binary32, which are exact (SPEC 6.1)."""
        if self.made is not None:
            return self.made
        height, scales = len(self.mask), self.scales.float()
        if self.axis in (Axis.ROW, Axis.ROW_COL):
            row = scales[:height].mul_(self.factor)
        else:
            row = self.factor.expand(height).contiguous()
        if self.axis in (Axis.COL, Axis.ROW_COL):
            return ComponentTensors(self.mask, row, scales[-self.width :], False)
        return ComponentTensors(self.mask, row, torch.ones(self.width, device=self.mask.device), True)

    def to(self, device: torch.device) -> HeldComponent:
        """The component on this device."""
        moved = replace(
            self, mask=self.mask.to(device), scales=self.scales.to(device), factor=self.factor.to(device)
        )  # fmt: skip
        return moved if device.type == "cpu" else replace(moved, made=moved.wide())


@lru_cache(maxsize=1024)
def _factor(exponent: int, scalar: float) -> Tensor:
    return torch.full((1,), 2.0**exponent * scalar, dtype=torch.float32)
