"""The patches of one variant in one layer, and the arithmetic of its rows.

    few rows      y = y_base + sum over k of row_k o ((x o col_k) B_k^T)       binary32, rounded once onto y_base
    many, exact   y = x W_v^T, W_v rebuilt a block at a time: the merged weights' values

The base product y_base is computed once for all rows of a batch, by the layer's own method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from peraxis_format.delta import ModuleDelta
from peraxis_format.engines.vllm.bridge import (
    ComponentTensors,
    Scratch,
    full_tensor,
    patched_rows,
    rebuild_tensor,
    signed_matmul,
)
from peraxis_format.engines.vllm.held import HeldComponent

__all__ = ["LayerPatch", "RankPatch", "add_components", "embedded", "merged_linear", "merged_parameter", "patch_of"]


@dataclass(frozen=True, slots=True, eq=False)
class RankPatch:
    """Rows [begin, end) of a parameter on this rank: components, or the exact tensor."""

    begin: int
    end: int
    held: tuple[HeldComponent, ...] = ()
    full: Tensor | None = None

    @property
    def factors(self) -> tuple[ComponentTensors, ...]:
        """The components for kernels; on the CPU with new scales at each call."""
        return tuple(component.wide() for component in self.held)

    @property
    def nbytes(self) -> int:
        """The bytes in memory."""
        return sum(component.nbytes for component in self.held) + (0 if self.full is None else self.full.nbytes)

    def to(self, device: torch.device) -> RankPatch:
        """The patch on this device."""
        held = tuple(component.to(device) for component in self.held)
        return RankPatch(self.begin, self.end, held, None if self.full is None else self.full.to(device))


LayerPatch = Mapping[str, Sequence[RankPatch]]
"""Parameter -> the patches of one variant, in the order of their rows."""


def patch_of(module: ModuleDelta, box: Sequence[tuple[int, int]], rows: tuple[int, int]) -> RankPatch:
    """The patch for a box of a matrix or of an exact tensor (this rank's piece), as a copy. rows: those of the live
    parameter.
    """
    if module.full is not None:
        index = tuple(slice(begin, end) for begin, end in box)
        return RankPatch(*rows, full=full_tensor(module)[index].clone())
    return RankPatch(*rows, held=tuple(HeldComponent.of(each, box, module.shape[-1]) for each in module.components))


def add_components(y: Tensor, x: Tensor, groups: Sequence[tuple[Tensor | slice, Sequence[RankPatch]]]) -> None:
    """y[rows] += x[rows] times the components of each group. x: [rows, d_in]; y: [rows, d_out], rounded once."""
    totals, products = [], []
    for rows, patches in groups:
        part = x[rows]
        total = torch.zeros(len(part), y.shape[1], device=y.device)
        totals.append((rows, total))
        products += [(part, p.factors, total[:, p.begin : p.end]) for p in patches if p.held]
    signed_matmul(products)
    for rows, total in totals:
        y[rows] = total.add_(y[rows]).to(y.dtype)


def merged_linear(
    x: Tensor, weight: Tensor, patches: Sequence[RankPatch], bias: Tensor | None, scratch: Scratch
) -> Tensor:
    """x times the merged weights. x: [rows, d_in]. Returns [rows, weight's rows], in x's dtype."""
    merged = merged_rows(weight, patches, scratch)
    return functional.linear(x, merged, bias)


def merged_rows(weight: Tensor, patches: Sequence[RankPatch], scratch: Scratch) -> Tensor:
    """The merged weight [d_out, d_in]; on the CPU it is a buffer that the next call overwrites."""
    whole = len(patches) == 1 and patches[0].full is not None and len(patches[0].full) == len(weight)
    if whole and patches[0].full is not None:
        return patches[0].full
    out = scratch.rows(len(weight), weight) if weight.device.type == "cpu" else torch.empty_like(weight)
    if sum(patch.end - patch.begin for patch in patches) < len(weight):
        out.copy_(weight)
    for patch in patches:
        rows = slice(patch.begin, patch.end)
        if patch.full is not None:
            out[rows] = patch.full
        else:
            rebuild_tensor(weight[rows], patch.factors, out=out[rows])
    return out


def merged_parameter(tensor: Tensor, patches: Sequence[RankPatch]) -> Tensor:
    """A small parameter (a norm's weight, a bias) with its patches, as a new tensor."""
    out = tensor.detach().clone()
    for patch in patches:
        if patch.full is not None:
            out[patch.begin : patch.end] = patch.full
        else:
            out[patch.begin : patch.end] = rebuild_tensor(out[patch.begin : patch.end].clone(), patch.factors)
    return out


def embedded(ids: Tensor, weight: Tensor, patches: Sequence[RankPatch]) -> Tensor:
    """Rows of the merged table. ids: int64 [rows], indices into this rank's rows. Returns [rows, width]."""
    unique, inverse = torch.unique(ids, return_inverse=True)
    return patched_rows(weight, unique, patches)[inverse]
