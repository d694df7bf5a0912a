"""Components of one matrix as float32 blocks of rows: what a merge that is no plain sum of components works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_tools.ops.merge_rows.numpy import add_terms

__all__ = ["Terms", "component_terms", "joined", "module_terms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """A sum of terms sign * (scale_i * weight_j), each exact in binary32 where the weight of the whole is 1 (SPEC 6.1).

    masks: [d_out, ceil(d_in/8)] each. scales: float32 [k, d_out], 2^e folded in. columns: float32 [k, d_in].
    """

    masks: tuple[NDArray[np.uint8], ...]
    scales: NDArray[np.float32]
    columns: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, int]:
        """d_out, d_in."""
        return self.scales.shape[1], self.columns.shape[1]

    def add(self, rows: slice, out: NDArray[np.float32], *, threads: int | None = 1) -> None:
        """out += the terms of these rows. out: [rows, d_in]. threads: None for one a processor."""
        if self.masks:
            masks = [mask[rows] for mask in self.masks]
            add_terms(out, masks, self.scales[:, rows], self.columns, threads=threads)

    def dense(self, rows: slice, *, threads: int | None = 1) -> NDArray[np.float32]:
        """The terms of these rows: [rows, d_in]."""
        out = np.zeros((rows.stop - rows.start, self.shape[1]), np.float32)
        self.add(rows, out, threads=threads)
        return out


def module_terms(module: pxd.ModuleDelta, index: tuple[int, ...] = (), *, weight: float = 1.0) -> Terms:
    """The matrix [..., d_out, d_in] at this index of the batch; no term for a `same` module."""
    parts = [component_terms(component, module.covered, index, weight=weight) for component in module.components]
    return joined(parts) if parts else _no_terms(module.covered)


def component_terms(
    component: pxd.Component, covered: tuple[int, ...], index: tuple[int, ...] = (), *, weight: float = 1.0
) -> Terms:
    """One component over this covered shape."""
    d_out, d_in = covered[-2:]
    scale = np.full((1, d_out), weight * 2.0**component.exponent)
    if component.row is not None:
        scale *= component.row[index].astype(np.float64)
    if component.scalar is not None:
        scale *= float(component.scalar[0])
    columns = np.ones((1, d_in), np.float32)
    if component.col is not None:
        columns[0] = component.col[index]
    return Terms(masks=(component.mask[index],), scales=scale.astype(np.float32), columns=columns)


def joined(parts: Sequence[Terms]) -> Terms:
    """All terms of several sums over one matrix, in order."""
    return Terms(
        masks=tuple(mask for part in parts for mask in part.masks),
        scales=np.concatenate([part.scales for part in parts]),
        columns=np.concatenate([part.columns for part in parts]),
    )


def _no_terms(covered: tuple[int, ...]) -> Terms:
    d_out, d_in = covered[-2:]
    return Terms(masks=(), scales=np.empty((0, d_out), np.float32), columns=np.empty((0, d_in), np.float32))
