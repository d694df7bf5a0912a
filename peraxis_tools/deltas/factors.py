"""Sums of components of one matrix, rebuilt as float32 blocks of rows. Merges with weights work on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_format.ops.backend import choose
from peraxis_format.ops.rebuild import rebuild

__all__ = ["ComponentSum", "joined", "module_sum", "weighted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentSum:
    """A sum of components of a matrix [d_out, d_in]; rows may be negative if a weight is folded in."""

    components: tuple[pxd.ComponentFactors, ...]
    shape: tuple[int, int]

    def add(self, rows: slice, out: NDArray[np.float32], *, threads: int | None = 1) -> None:
        """out += the terms of these rows, each addition in binary32. out: [rows, d_in].

        threads: at most this many; None for one per processor.
        """
        if self.components:
            parts = [component.part(rows) for component in self.components]
            kind, backend = pxd.DType.F32, choose("merge_rows", out.size)
            rebuild([parts], out, out, base_dtype=kind, dtype=kind, threads=threads, backend=backend)

    def dense(self, rows: slice, *, threads: int | None = 1) -> NDArray[np.float32]:
        """The terms of these rows: [rows, d_in]."""
        out = np.zeros((rows.stop - rows.start, self.shape[1]), np.float32)
        self.add(rows, out, threads=threads)
        return out


def module_sum(module: pxd.ModuleDelta, index: tuple[int, ...] = (), *, weight: float = 1.0) -> ComponentSum:
    """The matrix [..., d_out, d_in] at this index of the batch; no component for a `same` module."""
    batch, shape = module.covered[:-2], (module.covered[-2], module.covered[-1])
    element = int(np.ravel_multi_index(index, batch)) if batch else 0
    components = module.factors()[element]
    return ComponentSum(components=tuple(weighted(c, weight) for c in components), shape=shape)


def weighted(component: pxd.ComponentFactors, weight: float) -> pxd.ComponentFactors:
    """weight times a component: the product in binary64, then rounded to binary32."""
    return replace(component, row=(component.row.astype(np.float64) * weight).astype(np.float32))


def joined(parts: Sequence[ComponentSum]) -> ComponentSum:
    """All components of several sums over one matrix, in order."""
    return ComponentSum(components=tuple(c for part in parts for c in part.components), shape=parts[0].shape)
