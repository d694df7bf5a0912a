"""Fit the modules that share one input, from the moments of this input.

With a damping lambda, n tokens, and g the diagonal of G, the Hessian is

    H = G + lambda diag(g) + mu (d_in / n) mean(g) I

lambda keeps signs from relying on correlations that other text does not have. It is relative to each input, because a
few inputs of a language model are far larger than the others. mu adds an isotropic term, half a token for each
dimension, because few tokens give a poor estimate of G. The target

    T = D + W_f E H^-1      minimises   ||R - X T^T||^2 + the damping of (D - T)        (D* of the dense fit)

and, up to a constant, a delta Q costs  J(Q) = tr((T - Q) H (T - Q)^T). So one objective serves all fits: scales
(scales.py) and signs (signs.py) minimise J, component by component, then jointly. H and its factor are shared by all
modules that read this input.

It is not known in advance whether calibration helps. So each module is first fitted on the fit tokens. The error
||R - X Q^T||^2 on held-out tokens is then compared with that of the delta without text (`none`) and that of no delta
(`same`). A fit must be better by more than chance, a share 1 / sqrt(validation tokens) of the error. Then the fit is
repeated on all tokens. The reported error is that of the first fit, on tokens that it had not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peraxis_format import Axis
from peraxis_tools.compress.fit.adamw import adamw_component
from peraxis_tools.compress.fit.moments.sums import Moments, Statistics, Validation
from peraxis_tools.compress.fit.scales import (
    ComponentFit,
    fit_scales,
    mean_magnitudes,
    round_scales_f16,
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
    "fit_matrices",
    "fit_terms",
    "hessian_of",
    "quadratic",
    "residual_terms",
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
    sweeps: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One matrix to fit. base, fine_tuned: float32 [d_out, d_in].

    dtype: the dtype that base + delta is rounded to. axes: the candidates. components: the number of masks, 1 to 8.
    """

    base: Tensor
    fine_tuned: Tensor
    dtype: torch.dtype
    axes: tuple[Axis, ...] = AUTO_AXES
    components: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedMatrix:
    """A fitted delta; without components the base's own weight is best (`same`).

    Errors are mean squares of the module's output over the validation tokens: of this fit, of the same number of
    components without calibration (error_none), of no delta (error_same). note: why it is not the requested fit.
    """

    terms: tuple[ComponentFit, ...]
    error: float
    error_none: float
    error_same: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Hessian:
    """H, the factor of its inverse (if signs are chosen), and E H^-1 (if teacher inputs are known); float32."""

    matrix: Tensor
    factor: Factor | None
    input_shift: Tensor | None


@dataclass(frozen=True, slots=True)
class Quadratic:
    """J(Q) = tr((T - Q) H (T - Q)^T). target: T, float32 [d_out, d_in]; target_hessian: T H."""

    target: Tensor
    target_hessian: Tensor
    hessian: Hessian


def hessian_of(moments: Moments, *, signs: bool, damping: float = _DAMPING) -> Hessian | None:
    """The Hessian of these moments; None if they carry no information (no tokens, or all inputs are zero)."""
    diagonal = torch.diagonal(moments.G)
    mean = float(diagonal.mean())
    if not mean > 0.0:
        return None
    hessian = moments.G.clone()
    hessian.diagonal().add_(damping * diagonal + _PSEUDO_TOKENS * len(hessian) / max(moments.tokens, 1) * mean)
    input_shift = None
    if moments.E is not None:
        input_shift = torch.cholesky_solve(moments.E.t(), torch.linalg.cholesky(hessian)).t().float()
    return Hessian(matrix=hessian.float(), factor=inverse_factor(hessian) if signs else None, input_shift=input_shift)


def quadratic(delta: Tensor, fine_tuned: Tensor, hessian: Hessian) -> Quadratic:
    """The objective of one module. delta, fine_tuned: float32 [d_out, d_in]."""
    target = delta if hessian.input_shift is None else delta + fine_tuned @ hessian.input_shift
    return Quadratic(target=target, target_hessian=target @ hessian.matrix, hessian=hessian)


def residual_terms(delta: Tensor, axes: Sequence[Axis], components: int) -> tuple[ComponentFit, ...]:
    """`none`: sign and mean magnitude of the delta, then of the residual, and so on; least weight error."""

    def captured(axis: Axis) -> float:
        # A least squares fit lowers the sum of squares by sum(row^2) sum(col^2); row or col may be ones.
        found = mean_magnitudes(rest, axis)
        return float(found.row.square().sum() * found.col.square().sum())

    terms: list[ComponentFit] = []
    rest = delta
    for k in range(components):
        terms.append(start_component(rest, axes[0] if len(axes) == 1 else max(axes, key=captured)))
        if k + 1 < components:
            rest = rest - terms[-1].dense()
    return tuple(terms)


def fit_terms(
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
    terms = list(start) if start is not None and options.refine else _greedy(problem, axis, components, options)
    if options.refine:
        if start is None and problem.hessian.factor is not None:
            signs = gptq_signs(problem.target, [term.magnitude for term in terms], problem.hessian.factor)
            terms = _refit(_with_signs(terms, signs), problem)
        for _ in range(options.rounds):
            signs = coordinate_descent(
                problem.target,
                [term.magnitude for term in terms],
                [term.signs for term in terms],
                problem.hessian.matrix,
                sweeps=options.sweeps,
            )
            terms = _refit(_with_signs(terms, signs), problem)
    elif components > 1:
        for _ in range(options.rounds):
            terms = _refit(terms, problem)
    return tuple(sorted(terms, key=lambda term: -float(term.row.mean() * term.col.mean())))


def _greedy(problem: Quadratic, axis: Axis, components: int, options: FitOptions) -> list[ComponentFit]:
    terms: list[ComponentFit] = []
    rest, target_hessian = problem.target, problem.target_hessian
    # These scales are solved again after the signs, so they need not be exact yet.
    rounds = {"rounds": 1} if options.refine else {}
    for _ in range(components):
        terms.append(
            fit_scales(
                start_component(rest, axis), rest, problem.hessian.matrix, target_hessian=target_hessian, **rounds
            )
        )
        if len(terms) < components:
            rest = rest - terms[-1].dense()
            target_hessian = rest @ problem.hessian.matrix
    return terms


def _with_signs(terms: Sequence[ComponentFit], signs: Sequence[Tensor]) -> list[ComponentFit]:
    return [replace(term, signs=sign) for term, sign in zip(terms, signs, strict=True)]


def _refit(terms: Sequence[ComponentFit], problem: Quadratic) -> list[ComponentFit]:
    """Solve the scales of each component in turn, for the residual of the others."""
    if len(terms) == 1:
        return [
            fit_scales(
                terms[0], problem.target, problem.hessian.matrix, target_hessian=problem.target_hessian, rounds=1
            )
        ]
    rest = problem.target - dense(terms, problem.target)
    refitted = []
    for term in terms:
        rest = rest + term.dense()
        refitted.append(fit_scales(term, rest, problem.hessian.matrix, rounds=1))
        rest = rest - refitted[-1].dense()
    return refitted


def dense(terms: Sequence[ComponentFit], like: Tensor) -> Tensor:
    """The sum of the components, with one rounding for each as in SPEC 6.1; zeros like `like` if there are none."""
    total = torch.zeros_like(like)
    for term in terms:
        total = total + term.dense()
    return total


@dataclass(frozen=True, slots=True)
class _Trial:
    """A matrix fitted on the fit tokens. fitted: its result; start: the components that the final fit starts from."""

    fitted: FittedMatrix
    start: tuple[ComponentFit, ...] = ()
    axis: Axis | None = None


def fit_matrices(matrices: Sequence[Matrix], *, statistics: Statistics, options: FitOptions) -> list[FittedMatrix]:
    """Fit the matrices that read one input. This consumes `statistics`: held-out tokens are merged into the fit's.

    On the validation tokens the result is never worse than `none` and `same`; errors are those of the rounded weight.
    """
    hessian = None if options.adamw_steps else hessian_of(statistics.fit, signs=options.refine)
    validation_moments = statistics.validation_moments.float32()
    # gptq_signs alone shows whether calibration helps; the rounds then run once, on all tokens.
    first = replace(options, rounds=0) if options.refine and statistics.validation.tokens else options
    trials = [_try(matrix, hessian, validation_moments, statistics.fit, first) for matrix in matrices]
    del validation_moments
    if not statistics.validation.tokens or all(trial.axis is None for trial in trials):
        return [trial.fitted for trial in trials]
    statistics.fit.merge(statistics.validation)
    # The final fit starts from the signs of the trial, so it needs no gptq_signs and no factor.
    hessian = hessian_of(statistics.fit, signs=False)
    return [_finish(matrix, trial, hessian, options) for matrix, trial in zip(matrices, trials, strict=True)]


def _try(
    matrix: Matrix, hessian: Hessian | None, validation_moments: Moments, moments: Moments, options: FitOptions
) -> _Trial:
    delta = matrix.fine_tuned - matrix.base
    validation = Validation(matrix.fine_tuned, validation_moments)

    def error(terms: Sequence[ComponentFit]) -> float:
        applied = (matrix.base + dense(terms, matrix.base)).to(matrix.dtype).float()
        return validation.error(matrix.fine_tuned - applied)

    plain = tuple(map(round_scales_f16, residual_terms(delta, matrix.axes, matrix.components)))
    error_none, error_same = error(plain), error(())
    fitted = FittedMatrix(terms=plain, error=error_none, error_none=error_none, error_same=error_same)
    if options.adamw_steps:
        return _Trial(_fit_adamw(fitted, matrix, delta, moments, options, error))
    margin = 1.0 - max(validation.tokens, 1) ** -0.5
    if hessian is not None:
        problem = quadratic(delta, matrix.fine_tuned, hessian)
        axis = _axis(matrix, problem, moments.tokens, error)
        start = fit_terms(problem, axis, options, components=matrix.components)
        terms = tuple(map(round_scales_f16, start))
        found = error(terms)
        if found < margin * min(error_none, error_same):
            return _Trial(replace(fitted, terms=terms, error=found), start, axis)
    if validation.tokens and error_same <= margin * error_none:
        return _Trial(replace(fitted, terms=(), error=error_same, note="no delta lowers the held-out error; base used"))
    why = "no calibration token reaches it" if hessian is None else "calibration does not improve it"
    return _Trial(replace(fitted, note=f"{why}: mean |delta|"))


def _axis(matrix: Matrix, problem: Quadratic, tokens: int, error: Callable[[Sequence[ComponentFit]], float]) -> Axis:
    """Choose the axis: row+col, which contains the others, or with few tokens (where it might fit noise) the axis that
    is best on held-out tokens by scales alone.
    """
    if len(matrix.axes) == 1:
        return matrix.axes[0]
    if Axis.ROW_COL in matrix.axes and tokens >= matrix.base.shape[1]:
        return Axis.ROW_COL
    quick = FitOptions(refine=False)

    def scales_alone(axis: Axis) -> float:
        return error(tuple(map(round_scales_f16, fit_terms(problem, axis, quick, components=matrix.components))))

    return min(matrix.axes, key=scales_alone)


def _finish(matrix: Matrix, trial: _Trial, hessian: Hessian | None, options: FitOptions) -> FittedMatrix:
    if trial.axis is None or hessian is None:
        return trial.fitted
    problem = quadratic(matrix.fine_tuned - matrix.base, matrix.fine_tuned, hessian)
    terms = fit_terms(problem, trial.axis, options, components=matrix.components, start=trial.start)
    return replace(trial.fitted, terms=tuple(map(round_scales_f16, terms)))


def _fit_adamw(
    plain: FittedMatrix,
    matrix: Matrix,
    delta: Tensor,
    moments: Moments,
    options: FitOptions,
    error: Callable[[Sequence[ComponentFit]], float],
) -> FittedMatrix:
    """The paper's fit. Like the paper, it does not check that the fit is better than none."""
    if not moments.tokens:
        return replace(plain, note="no calibration token reaches it: mean |delta|")
    terms = [
        round_scales_f16(adamw_component(delta, matrix.fine_tuned, moments, a, steps=options.adamw_steps))
        for a in matrix.axes
    ]
    best = min(terms, key=lambda term: error((term,)))
    return replace(plain, terms=(best,), error=error((best,)))
