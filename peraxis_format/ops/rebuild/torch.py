"""Components as tensors on a device, and their arithmetic in plain torch: the reference of the serving kernels.

term = sign o (row x col), row with 2^e folded in: float32, exact (SPEC 6.1)
rebuild   round(f32(W) + term_0 + term_1 + ...)                     the bits of the merged weights
project   sum over k of row_k o ((x o col_k) B_k^T)                 float32, W untouched

On the CPU both go through numba where it is installed and the matrix is large (rebuild/numba.py,
signed_matmul/numba.py).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peraxis_format.delta import Component, ModuleDelta
from peraxis_format.ops.rebuild.numpy import have_compiled
from peraxis_format.ops.tensors import dtype_of, storage_array

__all__ = [
    "Scratch",
    "ComponentFactors",
    "add_projections",
    "is_quick",
    "project",
    "rebuild",
    "rebuild_rows",
    "factors_of",
]

_BLOCK = 1 << 22  # weights that are unpacked at a time
_COMPILED_FROM = 1 << 18
_THREADED_FROM = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class ComponentFactors:
    """One component of a matrix. mask: uint8 [d_out, ceil(d_in/8)]. row: float32 [d_out], with 2^e. col: [d_in].

    plain: col is all ones.
    """

    mask: Tensor
    row: Tensor
    col: Tensor
    plain: bool = False

    def signs(self, rows: slice | Tensor) -> Tensor:
        """float32 [rows, d_in]: +1 or -1."""
        lanes = torch.arange(8, dtype=torch.uint8, device=self.mask.device)
        bits = (self.mask[rows].unsqueeze(-1) >> lanes) & 1
        return bits.flatten(-2)[:, : len(self.col)].float().mul_(2).sub_(1)

    def dense(self, rows: slice | Tensor) -> Tensor:
        """The term of some rows, float32 [rows, d_in]."""
        return self.signs(rows) * (self.row[rows].unsqueeze(-1) * self.col)

    def part(self, rows: slice) -> ComponentFactors:
        """Some rows as a term of their own, in the same memory."""
        return ComponentFactors(self.mask[rows], self.row[rows], self.col, self.plain)


class Scratch(threading.local):
    """One buffer a thread for rebuilt weights: new memory for each would cost more than the rebuilding."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def rows(self, rows: int, like: Tensor) -> Tensor:
        """[rows, width of `like`] in its dtype, on the CPU; the next call overwrites it."""
        size = rows * like.shape[1] * like.element_size()
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        return self._buffer[:size].view(like.dtype).view(rows, like.shape[1])


def factors_of(module: ModuleDelta, device: torch.device) -> list[list[ComponentFactors]]:
    """The components of a `sign` module: one list for each batch element (one, for a matrix)."""
    d_out, d_in = module.shape[-2:]
    batch = 1
    for d in module.shape[:-2]:
        batch *= d
    return [[_term(component, e, batch, d_out, d_in, device) for component in module.components] for e in range(batch)]


def _term(component: Component, e: int, batch: int, d_out: int, d_in: int, device: torch.device) -> ComponentFactors:
    row = torch.full((d_out,), 2.0**component.exponent)
    if component.row is not None:
        row = row * torch.from_numpy(component.row.reshape(batch, d_out)[e].copy()).float()
    if component.scalar is not None:
        row = row * float(component.scalar[0])
    col = torch.ones(d_in)
    if component.col is not None:
        col = torch.from_numpy(component.col.reshape(batch, d_in)[e].copy()).float()
    mask = torch.from_numpy(component.mask.reshape(batch, d_out, -1)[e].copy())
    return ComponentFactors(mask.to(device), row.to(device), col.to(device), component.col is None)


def _blocks(d_out: int, d_in: int) -> list[slice]:
    step = max(1, _BLOCK // d_in)
    return [slice(begin, min(begin + step, d_out)) for begin in range(0, d_out, step)]


def is_quick(weight: Tensor) -> bool:
    """Whether numba is used for a weight."""
    return weight.device.type == "cpu" and weight.numel() >= _COMPILED_FROM and have_compiled()


def rebuild(
    weight: Tensor, terms: Sequence[ComponentFactors], *, out: Tensor | None = None, quick: bool | None = None
) -> Tensor:
    """The merged weight [d_out, d_in], bit for bit (SPEC 6.1). out: where to, contiguous. quick: see is_quick."""
    if out is None:
        out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if is_quick(weight) if quick is None else quick:
        from peraxis_format.ops.rebuild import numba as fast

        fast.rebuild_matrix(
            [term.mask.numpy() for term in terms],
            torch.stack([term.row for term in terms]).numpy(),
            torch.stack([term.col for term in terms]).numpy(),
            storage_array(weight.contiguous()),
            storage_array(out),
            dtype=dtype_of(weight, "weight"),
            threads=1 if weight.numel() < _THREADED_FROM else None,
        )
        return out
    for rows in _blocks(*weight.shape):
        out[rows] = rebuild_rows(weight, terms, rows)
    return out


def rebuild_rows(weight: Tensor, terms: Sequence[ComponentFactors], rows: slice | Tensor) -> Tensor:
    """Some rows of the merged weight."""
    total = weight[rows].float()
    for term in terms:
        total = total + term.dense(rows)
    return total.to(weight.dtype)


def project(x: Tensor, terms: Sequence[ComponentFactors]) -> Tensor:
    """x: [rows, d_in]. Returns float32 [rows, d_out]."""
    wide = x.float()
    out = torch.zeros(len(x), len(terms[0].row), device=x.device)
    for term in terms:
        scaled = wide * term.col
        for rows in _blocks(len(term.row), len(term.col)):
            out[:, rows] += (scaled @ term.signs(rows).t()) * term.row[rows]
    return out


def add_projections(products: Sequence[tuple[Tensor, Sequence[ComponentFactors], Tensor]], *, quick: bool) -> None:
    """out += project(x, terms) for each (x, terms, out), out float32 [rows, d_out]. quick: see is_quick."""
    if not quick:
        for x, terms, out in products:
            out += project(x, terms)
        return
    from peraxis_format.ops.signed_matmul.numba import Product, add_products

    add_products(
        [
            Product(
                masks=[term.mask.numpy() for term in terms],
                rows=[term.row.numpy() for term in terms],
                columns=[term.col.numpy() for term in terms],
                inputs=x.detach().float().numpy(),
                out=out.numpy(),
            )
            for x, terms, out in products
        ]
    )
