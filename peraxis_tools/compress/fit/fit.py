"""The modules that read one input, from its sums to their fitted deltas.

With a damping lambda, n tokens, and g the diagonal of G, the hessian is

    H = G + lambda diag(g) + mu (d_in / n) mean(g) I

lambda keeps signs from relying on correlations that other text does not have, and is relative to each input for itself,
as a few inputs of a language model are far larger than the rest; mu: few tokens know little of G, so inputs of all
directions alike are mixed in, half a token for each dimension. Over the target

    T = D + W_f E H^-1      minimises   ||R - X T^T||^2 + the damping of (D - T)        (D* of the dense fit)

and, up to a constant, every delta Q costs  J(Q) = tr((T - Q) H (T - Q)^T). So one objective serves
all fits: scales (scales.py) and signs (signs.py) minimise J, component after component, then jointly. H and what is
made of it are the same for all modules that read the input.

Whether calibration can be trusted at all is not known beforehand. So each module is first fitted on the fit tokens
and validated by ||R - X Q^T||^2 on held-out tokens, beside the delta that has seen no text (`none`) and no delta at all
(`same`). A fit must win by more than chance would let it, a share 1 / sqrt(validation tokens) of the error. From
there it goes on, on all tokens: what is reported is the error before that, of tokens that no fit had seen.
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

    axes: candidates where none is asked for. refine: choose signs, not only scales. adamw_steps: above 0, the paper's
    fit with so many steps in place of all else. rounds: alternations of signs and scales. sweeps: of coordinate
    descent in each.
    """

    axes: tuple[Axis, ...] = AUTO_AXES
    refine: bool = True
    adamw_steps: int = 0
    rounds: int = 3
    sweeps: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """What is to be fitted. base, fine_tuned: float32 [d_out, d_in].

    dtype: what base + delta is rounded to when applied. axes: candidates. components: masks, 1 to 8.
    """

    base: Tensor
    fine_tuned: Tensor
    dtype: torch.dtype
    axes: tuple[Axis, ...] = AUTO_AXES
    components: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedMatrix:
    """A fitted delta; no terms at all means that the base's own weight is best (`same`).

    Errors are mean squares of the module's output over the tokens that validated: of this fit, of the same terms
    without calibration (error_none), of no delta (error_same). note: why it is not the fit that was asked for.
    """

    terms: tuple[ComponentFit, ...]
    error: float
    error_none: float
    error_same: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Hessian:
    """H, the factor of its inverse (where signs are chosen), and E H^-1 (where teacher inputs are known); float32."""

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
    """The hessian of these sums; None where they carry no information (no tokens, or inputs all zero)."""
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
    """`none`: sign and mean magnitude of the delta, then of what that leaves, and so on; least weight error."""

    def captured(axis: Axis) -> float:
        # Each is a least squares fit, row or col being ones: it takes sum(row^2) sum(col^2) from the sum of squares.
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
    """Terms of least J: greedily one after the other, then signs and scales in turn, all together.

    start: terms of a problem much like this one, to go on from.
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
    # Scales that signs will follow, and that follow the signs, need not be exact yet.
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
    """The scales of each term in turn, for what the others leave."""
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
    """The sum of the terms, one rounding a term as SPEC 6.1 adds them; zeros like `like` where there are none."""
    total = torch.zeros_like(like)
    for term in terms:
        total = total + term.dense()
    return total


@dataclass(frozen=True, slots=True)
class _Trial:
    """A matrix fitted on the fit tokens. fitted: what it would be without more; start: terms to go on from."""

    fitted: FittedMatrix
    start: tuple[ComponentFit, ...] = ()
    axis: Axis | None = None


def fit_matrices(matrices: Sequence[Matrix], *, statistics: Statistics, options: FitOptions) -> list[FittedMatrix]:
    """Fit the matrices that read one input. Uses the statistics up: held-out tokens end in the fit.

    Never worse than `none` and `same` where it was validated; errors are those of the rounded weight.
    """
    hessian = None if options.adamw_steps else hessian_of(statistics.fit, signs=options.refine)
    validation_moments = statistics.validation_moments.float32()
    # Signs by feedback alone say whether calibration helps; the rounds then run once, on all tokens.
    first = replace(options, rounds=0) if options.refine and statistics.validation.tokens else options
    trials = [_try(matrix, hessian, validation_moments, statistics.fit, first) for matrix in matrices]
    del validation_moments
    if not statistics.validation.tokens or all(trial.axis is None for trial in trials):
        return [trial.fitted for trial in trials]
    statistics.fit.merge(statistics.validation)
    # Signs go on from those of the trial: no feedback, and no factor.
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
        return _Trial(replace(fitted, terms=(), error=error_same, note="no delta lowers the held-out error: base kept"))
    why = "no calibration token reaches it" if hessian is None else "calibration does not improve it"
    return _Trial(replace(fitted, note=f"{why}: mean |delta|"))


def _axis(matrix: Matrix, problem: Quadratic, tokens: int, error: Callable[[Sequence[ComponentFit]], float]) -> Axis:
    """row+col holds the others as special cases; where tokens are so few that it might fit noise, the best by scales
    alone on held-out tokens.
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
    """The paper's fit; like the paper, without a look at whether it is better than no fit."""
    if not moments.tokens:
        return replace(plain, note="no calibration token reaches it: mean |delta|")
    terms = [
        round_scales_f16(adamw_component(delta, matrix.fine_tuned, moments, a, steps=options.adamw_steps))
        for a in matrix.axes
    ]
    best = min(terms, key=lambda term: error((term,)))
    return replace(plain, terms=(best,), error=error((best,)))
