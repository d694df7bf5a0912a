"""Fit a table that is read by rows: an embedding that is not tied to the head.

A token reads only its own row, so rows are independent, and calibration gives only the number of times that each row is
read:

    J = sum_i n_i || D_i - sum_k B_ki o (row_ki col_k) ||^2       n_i = sqrt(times that the text reads row i + 0.1)

(o: elementwise. The root and the 0.1 are there because other text reads other rows.) The fit starts from mean |D|
(mean.py). In each round, each component k is solved in turn, with R the residual of the others:

    B_k = sign(R)       row_ki = <B_ki o R_i, col_k> / ||col_k||^2       then all col jointly, by least squares

The scale of a row does not depend on n_i; col is shared by all rows, so frequent rows determine it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peraxis_format import Axis, Component, pack_signs, unpack_signs
from peraxis_tools.compress.fit.encode import encode_component
from peraxis_tools.compress.fit.signs import unit
from peraxis_tools.compress.run.types import ModuleReport

__all__ = ["FittedTable", "fit_table", "importance"]

_ROUNDS = 3
_UNSEEN = 0.1
_CHUNK = 1 << 22  # values of all components in one chunk
_RIDGE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedTable:
    """Components of a table, and J / sum(n) of these components, of the start, and of no delta."""

    components: tuple[Component, ...]
    report: ModuleReport


def importance(counts: Tensor) -> Tensor:
    """n, float32 [rows], from the number of times that the text reads each row."""
    return torch.sqrt(counts.float() + _UNSEEN)


def fit_table(
    delta: Callable[[slice], Tensor], importance: Tensor, start: Sequence[Component], *, signs: bool
) -> FittedTable:
    """Fit a table from `start`. delta: rows of D, float32 [n, d], on the device of importance [rows].

    signs: whether signs may change too. If J after rounding to F16 is not smaller, the start is returned.
    """
    table = _Table(delta, importance, start)
    error_none, error_same = table.errors()
    if not error_same > 0.0 or any(component.axis is Axis.TENSOR for component in start):
        return FittedTable(components=tuple(start), report=ModuleReport())
    for _ in range(_ROUNDS):
        table.improve(signs=signs)
    fitted = table.components()
    error, _ = _Table(delta, importance, fitted).errors()
    if error >= error_none:
        fitted, error = tuple(start), error_none
    return FittedTable(
        components=fitted, report=ModuleReport(error=error, error_none=error_none, error_same=error_same)
    )


class _Table:
    """Components during the fit. Signs stay packed; row and col are float32, and ones if the axis lacks them."""

    def __init__(self, delta: Callable[[slice], Tensor], importance: Tensor, start: Sequence[Component]) -> None:
        self._delta, self._importance = delta, importance
        self._axes = [component.axis for component in start]
        self._masks = [np.array(component.mask) for component in start]
        rows, width = len(importance), delta(slice(0, 1)).shape[1]
        self._row, self._col = importance.new_ones(len(start), rows), importance.new_ones(len(start), width)
        for k, component in enumerate(start):
            (factors,) = component.factors((rows, width))
            row, col = torch.from_numpy(factors.row), torch.from_numpy(factors.col)
            if component.axis is Axis.COL:
                row, col = torch.ones_like(row), row[0] * col  # 2^e is folded into the vector that may change
            self._row[k], self._col[k] = row, col
        step = max(1, _CHUNK // (max(1, len(start)) * width))
        self._chunks = [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]

    def errors(self) -> tuple[float, float]:
        """(J, J of no delta), each divided by sum(n)."""
        total = np.zeros(2)
        for rows in self._chunks:
            delta = self._delta(rows)
            rest = delta - sum(self._terms(self._signs(rows), rows))
            weight = self._importance[rows].double()
            total += [float(weight @ value.double().square().sum(1)) for value in (rest, delta)]
        error, same = total / float(self._importance.double().sum())
        return float(error), float(same)

    def improve(self, *, signs: bool) -> None:
        """Run one round: signs and rows chunk by chunk, then all columns."""
        count, width = self._col.shape
        normal = self._col.new_zeros(width, count, count, dtype=torch.float64)
        right = self._col.new_zeros(width, count, dtype=torch.float64)
        for rows in self._chunks:
            delta, patterns = self._delta(rows), self._signs(rows)
            terms = self._terms(patterns, rows)
            rest = delta - sum(terms)
            for k in range(count):
                rest += terms[k]
                if signs:
                    patterns[k] = unit(rest >= 0)
                if self._axes[k] is not Axis.COL:
                    self._row[k, rows] = self._best_row(patterns[k] * rest, k)
                rest -= patterns[k] * self._row[k, rows, None] * self._col[k]
                self._masks[k][rows] = pack_signs((patterns[k] > 0).cpu().numpy())
            for k in range(count):
                weighted = patterns[k] * (self._row[k, rows] * self._importance[rows])[:, None]
                right[:, k] += (weighted * delta).sum(0)
                for m in range(k + 1):
                    normal[:, k, m] += (weighted * patterns[m]).t() @ self._row[m, rows]
        self._solve_columns(normal + normal.tril(-1).mT, right)

    def components(self) -> tuple[Component, ...]:
        """The components as the file stores them."""
        return tuple(
            encode_component(
                self._masks[k][None],
                self._row[k : k + 1].double().cpu().numpy(),
                self._col[k : k + 1].double().cpu().numpy(),
                axis=axis,
                batch=(),
            )
            for k, axis in enumerate(self._axes)
        )

    def _best_row(self, projected: Tensor, k: int) -> Tensor:
        """The scales of rows. They are never negative: then the row is better without this component."""
        power = self._col[k].square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        return ((projected @ self._col[k]) / power).clamp_min(0.0)

    def _solve_columns(self, normal: Tensor, right: Tensor) -> None:
        """Solve the columns of all components that have them by least squares; the others are unchanged."""
        free = [k for k, axis in enumerate(self._axes) if axis is not Axis.ROW]
        fixed = [k for k, axis in enumerate(self._axes) if axis is Axis.ROW]
        if not free:
            return
        old = self._col.double().t()
        right = right[:, free] - (normal[:, free][:, :, fixed] @ old[:, fixed, None])[..., 0]
        system = normal[:, free][:, :, free]
        ridge = _RIDGE * torch.diagonal(system, dim1=1, dim2=2).mean(-1) + torch.finfo(torch.float32).tiny
        system = system + torch.diag_embed(ridge[:, None].expand(-1, len(free)))
        found = torch.linalg.solve(system, right + ridge[:, None] * old[:, free])
        for place, k in enumerate(free):
            self._col[k] = torch.where(found[:, place] > 0, found[:, place], old[:, k]).float()

    def _signs(self, rows: slice) -> list[Tensor]:
        """The signs of some rows as +1 and -1, float32 [n, d] for each component."""
        unpacked = (unpack_signs(mask[rows], self._col.shape[1]) for mask in self._masks)
        return [unit(torch.from_numpy(signs).to(self._col.device)) for signs in unpacked]

    def _terms(self, patterns: Sequence[Tensor], rows: slice) -> list[Tensor]:
        return [pattern * self._row[k, rows, None] * self._col[k] for k, pattern in enumerate(patterns)]
