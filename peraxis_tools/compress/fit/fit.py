"""Fit the modules that share one input, from the moments of this input.

With a damping lambda, n tokens, and g the diagonal of G, the Hessian is

    H = G + lambda diag(g) + mu (d_in / n) mean(g) I

lambda keeps signs from relying on correlations that other text does not have. It is relative to each input, because a
few inputs of a language model are far larger than the others. mu adds an isotropic term, half a token for each
dimension, because few tokens give a poor estimate of G. The target

    T = D + s W_f E H^-1    for s = 1 minimises   ||R - X T^T||^2 + the damping of (D - T)      (D* of the dense fit)

and, up to a constant, a delta Q costs  J(Q) = tr((T - Q) H (T - Q)^T). So one objective serves all fits: scales
(scales.py) and signs (signs.py) minimise J, component by component, then jointly. H and its factor are shared by all
modules that read this input.

The correction W_f E H^-1 makes up for the errors of the blocks before. It has as many unknowns as the module has
weights, so with few tokens most of it is noise; choice.py finds the share s of least error on another text, and so
whether calibration helps at all. More damping for the correction alone, in place of s, gains as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from peraxis_format import Axis
from peraxis_tools.compress.fit.moments.sums import Moments
from peraxis_tools.compress.fit.scales import (
    ComponentFit,
    fit_scales,
    mean_magnitudes,
    start_component,
)
from peraxis_tools.compress.fit.signs import Factor, coordinate_descent, gptq_signs, inverse_factor

__all__ = [
    "AUTO_AXES",
    "FitOptions",
    "FittedMatrix",
    "Matrix",
    "Hessian",
    "Quadratic",
    "dense",
    "fit_components",
    "hessian_of",
    "quadratic",
    "mean_components_of",
]

AUTO_AXES = (Axis.ROW, Axis.COL, Axis.ROW_COL, Axis.TENSOR)
_DAMPING = 0.1  # lambda
_PSEUDO_TOKENS = 0.5  # mu


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """How a matrix is fitted.

    axes: the candidates if the plan leaves the axis open. refine: choose signs, not only scales. adamw_steps: if above
    0, the paper's fit with this many steps replaces all others. rounds: alternations of signs and scales. sweeps:
    sweeps of coordinate descent in each round.
    """

    axes: tuple[Axis, ...] = AUTO_AXES
    refine: bool = True
    adamw_steps: int = 0
    rounds: int = 3
    sweeps: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One matrix to fit. base, fine_tuned: [d_out, d_in], as stored; fits want them as float32 (`rows`).

    dtype: what base + delta is rounded to when applied. axes: candidates. components: masks, 1 to 8. used: of a table,
    the rows whose tokens the text has, bool [d_out]; None: all.
    """

    base: Tensor
    fine_tuned: Tensor
    dtype: torch.dtype
    axes: tuple[Axis, ...] = AUTO_AXES
    components: int = 1
    used: Tensor | None = None

    def rows(self, chosen: slice | Tensor = slice(None)) -> Matrix:
        """The matrix of these rows, in float32."""
        return replace(self, base=self.base[chosen].float(), fine_tuned=self.fine_tuned[chosen].float(), used=None)

    @property
    def delta(self) -> Tensor:
        """float32 [d_out, d_in]."""
        return self.fine_tuned.float() - self.base.float()


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedMatrix:
    """A fitted delta; without components the base's own weight is best (`same`).

    Errors are mean squares of the module's output over the validation tokens: of this fit, of the same number of
    components without calibration (error_none), of no delta (error_same). note: why it is not the requested fit.
    """

    components: tuple[ComponentFit, ...]
    error: float
    error_none: float
    error_same: float
    note: str = ""


@dataclass(frozen=True)
class Hessian:
    """H in float32, the factor of its inverse (if signs are chosen); if teacher inputs are known and differ from the
    student's, E in float32, and, without that factor, L with H = L L^T.

    L is float32: an error of a Cholesky factor does not depend on the sizes of the inputs, and the damping bounds the
    condition of H with these sizes taken out.
    """

    matrix: Tensor
    factor: Factor | None
    cross: Tensor | None
    lower: Tensor | None

    def correction(self, fine_tuned: Tensor) -> Tensor:
        """W_f E H^-1, float32 [d_out, d_in], solved for W_f's rows or for E's, whichever are fewer."""
        if self.cross is None:
            return torch.zeros_like(fine_tuned)
        if len(fine_tuned) < len(self.cross):
            return self._solved(fine_tuned @ self.cross)
        return fine_tuned @ self._drift

    @cached_property
    def _drift(self) -> Tensor:
        """E H^-1, which the modules that read this input share."""
        return torch.zeros_like(self.matrix) if self.cross is None else self._solved(self.cross)

    def _solved(self, rows: Tensor) -> Tensor:
        """rows H^-1, float32."""
        if self.factor is not None:
            return self.factor.solved(rows)
        if self.lower is None:
            raise ValueError("a Hessian with teacher inputs and without a factor")
        return torch.cholesky_solve(rows.t(), self.lower).t().contiguous()


@dataclass(frozen=True, slots=True)
class Quadratic:
    """J(Q) = tr((T - Q) H (T - Q)^T). target: T, float32 [d_out, d_in]; target_hessian: T H."""

    target: Tensor
    target_hessian: Tensor
    hessian: Hessian


def hessian_of(moments: Moments, *, signs: bool) -> Hessian | None:
    """The Hessian of these moments; None if they carry no information (no tokens, or all inputs are zero)."""
    diagonal = torch.diagonal(moments.G)
    mean = float(diagonal.mean())
    if not mean > 0.0:
        return None
    damping = _DAMPING * diagonal + _PSEUDO_TOKENS * len(diagonal) / max(moments.tokens, 1) * mean
    differs = moments.E is not None and bool(moments.E.any())
    matrix, factor, lower = moments.G.float(), None, None
    matrix.diagonal().copy_(diagonal + damping)
    if signs:
        hessian = moments.G.clone()
        hessian.diagonal().add_(damping)
        factor = inverse_factor(hessian)
    elif differs:
        lower = torch.linalg.cholesky(matrix)
    cross = moments.E.float() if moments.E is not None and differs else None
    return Hessian(matrix=matrix, factor=factor, cross=cross, lower=lower)


def quadratic(target: Tensor, hessian: Hessian) -> Quadratic:
    """The objective of one module. target: T, float32 [d_out, d_in]."""
    return Quadratic(target=target, target_hessian=target @ hessian.matrix, hessian=hessian)


def mean_components_of(delta: Tensor, axes: Sequence[Axis], components: int) -> tuple[ComponentFit, ...]:
    """`none`: sign and mean magnitude of the delta, then of the residual, and so on; least weight error."""

    def captured(axis: Axis) -> float:
        # A least squares fit lowers the sum of squares by sum(row^2) sum(col^2); row or col may be ones.
        means = mean_magnitudes(rest, axis)
        return float(means.row.square().sum() * means.col.square().sum())

    found: list[ComponentFit] = []
    rest = delta
    for k in range(components):
        found.append(start_component(rest, axes[0] if len(axes) == 1 else max(axes, key=captured)))
        if k + 1 < components:
            rest = rest - found[-1].dense()
    return tuple(found)


def fit_components(
    problem: Quadratic,
    axis: Axis,
    options: FitOptions,
    *,
    components: int = 1,
    start: Sequence[ComponentFit] | None = None,
) -> tuple[ComponentFit, ...]:
    """Components of least J: first greedily one after the other, then signs and scales alternate for all of them.

    start: the components of a similar problem, as a starting point.
    """
    found = list(start) if start is not None and options.refine else _greedy(problem, axis, components, options)
    if options.refine:
        if start is None and problem.hessian.factor is not None:
            signs = gptq_signs(problem.target, [component.magnitude for component in found], problem.hessian.factor)
            found = _refit(_with_signs(found, signs), problem)
        for _ in range(options.rounds):
            signs = coordinate_descent(
                problem.target,
                [component.magnitude for component in found],
                [component.signs for component in found],
                problem.hessian.matrix,
                sweeps=options.sweeps,
                gradient=_gradient(problem, found),
            )
            found = _refit(_with_signs(found, signs), problem)
    elif components > 1:
        for _ in range(options.rounds):
            found = _refit(found, problem)
    return tuple(sorted(found, key=lambda component: -float(component.row.mean() * component.col.mean())))


def _greedy(problem: Quadratic, axis: Axis, components: int, options: FitOptions) -> list[ComponentFit]:
    found: list[ComponentFit] = []
    rest, target_hessian = problem.target, problem.target_hessian
    # These scales are solved again after the signs, so they need not be exact yet.
    rounds = {"rounds": 1} if options.refine else {}
    for _ in range(components):
        found.append(
            fit_scales(
                start_component(rest, axis), rest, problem.hessian.matrix, target_hessian=target_hessian, **rounds
            )
        )
        if len(found) < components:
            rest = rest - found[-1].dense()
            target_hessian = rest @ problem.hessian.matrix
    return found


def _gradient(problem: Quadratic, components: Sequence[ComponentFit]) -> Tensor | None:
    """(T - Q) H from the images of the components; None if one is not known."""
    gradient = problem.target_hessian.clone()
    for component in components:
        if component.image is None:
            return None
        gradient.addcmul_(component.image, component.row[:, None], value=-1.0)
    return gradient


def _with_signs(components: Sequence[ComponentFit], signs: Sequence[Tensor]) -> list[ComponentFit]:
    return [replace(component, signs=sign, image=None) for component, sign in zip(components, signs, strict=True)]


def _refit(components: Sequence[ComponentFit], problem: Quadratic) -> list[ComponentFit]:
    """Solve the scales of each component in turn, for the residual of the others."""
    if len(components) == 1:
        return [
            fit_scales(
                components[0], problem.target, problem.hessian.matrix, target_hessian=problem.target_hessian, rounds=1
            )
        ]
    rest = problem.target - dense(components, problem.target)
    refitted = []
    for component in components:
        rest = rest + component.dense()
        refitted.append(fit_scales(component, rest, problem.hessian.matrix, rounds=1))
        rest = rest - refitted[-1].dense()
    return refitted


def dense(components: Sequence[ComponentFit], like: Tensor) -> Tensor:
    """The sum of the components, with one rounding for each as in SPEC 6.1; zeros like `like` if there are none."""
    total = torch.zeros_like(like)
    for component in components:
        total = total + component.dense()
    return total
