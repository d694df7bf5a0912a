"""The truncated singular value decomposition of a delta, from its packed form, by blocks of rows.

    X <- orthonormal basis of D^T D X, four times from a random X [d_in, r + 16]       (subspace iteration)
    D X = U S W^T          D ~ U_r S_r (X W)_r^T          ||D - that||^2 = ||D||^2 - sum over i <= r of s_i^2

The last equation holds because X has orthonormal columns. If the error is small, it would be a difference of almost
equal numbers, so it is measured instead. A dense matrix is never in memory: there are five passes over blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_tools.deltas.rows import BaseRows, delta_rows, row_blocks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DenseRows", "ExactRows", "LowRank", "low_rank", "whole_spectrum"]

_BLOCK_ELEMENTS: Final = 1 << 22  # large enough for a threaded matrix product
_EXTRA: Final = 16
_ITERATIONS: Final = 4
_SEED: Final = 0  # fixed, so that equal deltas give equal factors
_MEASURED_BELOW: Final = 1e-2  # share of the square norm; binary32 products have errors of 1e-6


class DenseRows(Protocol):
    """The delta of a matrix, which is read by rows. factors.ComponentSum is one."""

    @property
    def shape(self) -> tuple[int, int]:
        """[d_out, d_in]."""

    def dense(self, rows: slice, *, threads: int | None = 1) -> NDArray[np.float32]:
        """The delta of these rows, [rows, d_in]."""


class ExactRows:
    """The delta of a matrix that is stored exactly: the tensor minus the base."""

    def __init__(self, module: pxd.ModuleDelta, base: BaseRows) -> None:
        self.shape = (module.covered[-2], module.covered[-1])
        self._module = module
        self._base = base

    def dense(self, rows: slice, *, threads: int | None = 1) -> NDArray[np.float32]:
        """The delta of these rows, [rows, d_in]. The number of threads is not used."""
        return delta_rows(self._module, rows, self._base)


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """D ~ left @ right. left: float32 [d_out, r]. right: [r, d_in]. The squares: ||D||^2 and ||D - left @ right||^2."""

    left: NDArray[np.float32]
    right: NDArray[np.float32]
    square_norm: float
    square_error: float


def low_rank(terms: DenseRows, rank: int) -> LowRank:
    """Nearly the best factors of this rank, from five passes; rank + 16 is at most the smaller dimension."""
    d_out, d_in = terms.shape
    basis = np.random.default_rng(_SEED).standard_normal((d_in, min(d_in, rank + _EXTRA)), np.float32)
    for _ in range(_ITERATIONS):
        turned = np.zeros(basis.shape, np.float32)
        for _, block in _blocks(terms):
            turned += block.T @ (block @ basis)
        basis = np.linalg.qr(turned)[0]
    product = np.empty((d_out, basis.shape[1]), np.float32)
    square = 0.0
    for rows, block in _blocks(terms):
        product[rows] = block @ basis
        square += _square(block)
    u, s, wt = np.linalg.svd(product.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    left = (u[:, :rank] * root).astype(np.float32)
    right = (root[:, None] * (wt[:rank] @ basis.T)).astype(np.float32)
    error = square - float(np.square(s[:rank]).sum())
    if error < _MEASURED_BELOW * square:
        error = 0.0
        for rows, block in _blocks(terms):
            block -= left[rows] @ right
            error += _square(block)
    return LowRank(left=left, right=right, square_norm=square, square_error=error)


def whole_spectrum(terms: DenseRows, rank: int | None, max_error: float | None) -> LowRank:
    """Factors from all singular values of the dense matrix: for a large rank, or a rank that max_error determines."""
    import torch

    matrix = torch.from_numpy(terms.dense(slice(0, terms.shape[0]), threads=None))
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    square = s.double().square()
    if rank is None:
        kept = torch.cumsum(square, 0) / square.sum().clamp_min(torch.finfo(torch.float64).tiny)
        wanted = 1.0 - (max_error or 0.0) ** 2
        rank = int(torch.searchsorted(kept, torch.tensor(wanted, dtype=torch.float64))) + 1
    norm, r = _norm(matrix), min(rank, *matrix.shape)
    while True:
        root = s[:r].clamp_min(0.0).sqrt()
        left, right = u[:, :r] * root, root[:, None] * vt[:r]
        lost = _norm(matrix - left @ right)
        # The product is rounded to binary32, so its error may be just above the bound that the spectrum is below.
        if max_error is None or lost <= max_error * norm or r == min(matrix.shape):
            return LowRank(left=left.numpy(), right=right.numpy(), square_norm=norm**2, square_error=lost**2)
        r = min(r + 1 + min(matrix.shape) // 64, *matrix.shape)  # few products, because each takes seconds when large


def _norm(matrix: Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def _square(block: NDArray[np.float32]) -> float:
    return float(np.square(block, dtype=np.float64).sum())


def _blocks(terms: DenseRows) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    for rows in row_blocks(terms.shape, elements=_BLOCK_ELEMENTS):
        yield rows, terms.dense(rows, threads=None)
