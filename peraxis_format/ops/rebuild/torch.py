"""Components as tensors on a device, and rebuild in plain torch, the reference of the serving kernels.

The bits are those of the numpy reference: term = sign * (row_i * col_j) is exact in binary32 (SPEC 6.1), each addition
is in binary32, and NaN, whose pattern torch does not specify, is made canonical (SPEC 6.2).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peraxis_format.delta import ComponentFactors, ModuleDelta
from peraxis_format.ops.tensors import dtype_of, storage_array

__all__ = [
    "ComponentTensors",
    "Scratch",
    "component_tensors",
    "output_like",
    "rebuild",
    "rebuild_compiled",
    "row_blocks",
]

_BLOCK = 1 << 22  # weights to unpack at a time
_THREADED_FROM = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class ComponentTensors:
    """ComponentFactors on a device. mask: uint8 [d_out, ceil(d_in/8)]. row: float32 [d_out], with 2^e. col: [d_in].

    plain: col is all ones.
    """

    mask: Tensor
    row: Tensor
    col: Tensor
    plain: bool = False

    @classmethod
    def of(cls, component: ComponentFactors, device: torch.device) -> ComponentTensors:
        """A copy on a device."""
        arrays = (component.mask, component.row, component.col)
        mask, row, col = (torch.from_numpy(array.copy()).to(device) for array in arrays)
        return cls(mask, row, col, component.plain)

    def signs(self, rows: slice | Tensor) -> Tensor:
        """float32 [rows, d_in]: +1 or -1."""
        lanes = torch.arange(8, dtype=torch.uint8, device=self.mask.device)
        bits = (self.mask[rows].unsqueeze(-1) >> lanes) & 1
        return bits.flatten(-2)[:, : len(self.col)].float().mul_(2).sub_(1)

    def dense(self, rows: slice | Tensor) -> Tensor:
        """sign * scale of some rows, float32 [rows, d_in]."""
        return self.signs(rows) * (self.row[rows].unsqueeze(-1) * self.col)

    def part(self, rows: slice | Tensor) -> ComponentTensors:
        """Some rows as a component; it shares memory for a slice and is a copy for indices."""
        return ComponentTensors(self.mask[rows], self.row[rows], self.col, self.plain)

    def factors(self) -> ComponentFactors:
        """The component as arrays, sharing memory; tensors must be on the CPU."""
        return ComponentFactors(
            mask=self.mask.numpy(), row=self.row.numpy(), col=self.col.numpy(), plain=self.plain
        )  # fmt: skip


class Scratch(threading.local):
    """One buffer per thread for rebuilt weights, because new memory would cost more than the rebuilding."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def rows(self, rows: int, like: Tensor) -> Tensor:
        """[rows, width of `like`] in its dtype, on the CPU; the next call overwrites it."""
        size = rows * like.shape[1] * like.element_size()
        if self._buffer.numel() < size:
            with torch.inference_mode(False):  # so that calls in each mode can write it
                self._buffer = torch.empty(size, dtype=torch.uint8)
        return self._buffer[:size].view(like.dtype).view(rows, like.shape[1])


def component_tensors(module: ModuleDelta, device: torch.device) -> list[list[ComponentTensors]]:
    """The components of a `sign` module: one list for each matrix of the batch (one, for a matrix)."""
    return [[ComponentTensors.of(component, device) for component in components] for components in module.factors()]


def row_blocks(d_out: int, d_in: int) -> list[slice]:
    """Blocks of rows whose unpacked signs take at most 16 MiB."""
    step = max(1, _BLOCK // max(1, d_in))
    return [slice(begin, min(begin + step, d_out)) for begin in range(0, d_out, step)]


def output_like(weight: Tensor) -> Tensor:
    """A new contiguous tensor of the weight's shape and dtype."""
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def rebuild(weight: Tensor, components: Sequence[ComponentTensors], out: Tensor) -> None:
    """out = weight + components. Arguments: see rebuild_tensor."""
    for rows in row_blocks(*weight.shape):
        total = weight[rows].float()
        for component in components:
            total = total + component.dense(rows)
        out[rows] = total.to(out.dtype).masked_fill_(total.isnan(), math.nan)  # SPEC 6.2


def rebuild_compiled(weight: Tensor, components: Sequence[ComponentTensors], out: Tensor) -> None:
    """`rebuild` with numba, on the memory of CPU tensors."""
    from peraxis_format.ops.rebuild import numba as compiled

    compiled.rebuild(
        [[component.factors() for component in components]],
        storage_array(weight.contiguous())[None],
        storage_array(out)[None],
        base_dtype=dtype_of(weight, "weight"),
        dtype=dtype_of(out, "out"),
        threads=1 if weight.numel() < _THREADED_FROM else None,
    )
