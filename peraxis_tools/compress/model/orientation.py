"""A module of a checkpoint as matrices for the fit, and back: orientation, batch elements, axes.

A checkpoint stores a matrix as [d_out, d_in] or transposed, or many in one tensor (experts); a fit sees [d_out, d_in]
alone. The first forward pass shows the orientation (stages.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from peraxis_format import Axis, Component
from peraxis_format.ops.tensors import TORCH_DTYPES
from peraxis_tools.checkpoints.parameter_names import ParameterSlice
from peraxis_tools.compress.fit.fit import FittedMatrix, Matrix
from peraxis_tools.compress.fit.moments.stages import Key, Stage
from peraxis_tools.compress.model.components import components_of
from peraxis_tools.compress.model.weights import Weights
from peraxis_tools.compress.plan.plan import PlannedModule
from peraxis_tools.compress.run.types import FittedModule, ModuleReport

__all__ = ["OrientedModule"]

_SWAPPED: Final = {Axis.ROW: Axis.COL, Axis.COL: Axis.ROW}


@dataclass(frozen=True, slots=True)
class OrientedModule:
    """A module in its storage orientation: base and fine-tuned as stored, [..., rows, cols]; the key of each matrix.

    An unchanged module has no keys, because there is nothing to fit.
    """

    planned: PlannedModule
    base: Tensor
    fine_tuned: Tensor
    transposed: bool
    keys: tuple[Key, ...]

    @classmethod
    def of(cls, planned: PlannedModule, piece: ParameterSlice, weights: Weights, stage: Stage) -> OrientedModule:
        base, tuned = weights.pair(planned)
        batch = base.shape[:-2].numel() if base.dim() > 2 else None
        keys: tuple[Key, ...] = ((piece.parameter, piece.index),)
        if base.dtype is tuned.dtype and torch.equal(base, tuned):
            keys = ()
        elif batch is not None:
            keys = tuple((piece.parameter, e) for e in range(batch))
        return cls(planned, base, tuned, stage.transposed[piece.parameter], keys)

    def matrix(self, e: int, candidates: tuple[Axis, ...]) -> Matrix:
        """Batch element e, [d_out, d_in]. candidates: the axes if the plan leaves the axis open."""
        base, tuned = (tensor.reshape(-1, *tensor.shape[-2:])[e] for tensor in (self.base, self.fine_tuned))
        axes = candidates if self.planned.axis is None else (self.planned.axis,)
        if self.base.dim() > 2 and len(axes) > 1:
            axes = (Axis.ROW_COL,)  # experts of one tensor share their axis; row+col contains row and col
        if self.transposed:
            base, tuned = base.t().contiguous(), tuned.t().contiguous()
            axes = tuple(_SWAPPED.get(axis, axis) for axis in axes)
        return Matrix(
            base=base,
            fine_tuned=tuned,
            dtype=TORCH_DTYPES[self.planned.dtype],
            axes=axes,
            components=self.planned.components,
        )

    def module(self, results: Sequence[FittedMatrix]) -> FittedModule:
        """The module from the result of each matrix."""
        if not results:
            return FittedModule(name=self.planned.name, components=(), report=ModuleReport(note="unchanged"))
        components: tuple[Component, ...] = ()
        if any(result.components for result in results):
            components = components_of(
                [result.components for result in results], batch=tuple(self.base.shape[:-2]), transposed=self.transposed
            )
        return FittedModule(name=self.planned.name, components=components, report=_report(results))


def _report(results: Sequence[FittedMatrix]) -> ModuleReport:
    notes = sorted({result.note for result in results if result.note})
    count = sum(1 for result in results if result.note)
    share = f"{count} of {len(results)} experts: " if len(results) > 1 and notes else ""
    return ModuleReport(
        error=sum(result.error for result in results),
        error_none=sum(result.error_none for result in results),
        error_same=sum(result.error_same for result in results),
        note=share + "; ".join(notes),
    )
