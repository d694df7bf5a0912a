"""The modules that read one input, from its sums to their stored deltas.

With a damping lambda, n tokens, and g the diagonal of G, the metric is

    H = G + lambda diag(g) + mu (d_in / n) mean(g) I

lambda keeps signs from relying on correlations that other text does not have, and is relative to each input for itself,
as a few inputs of a language model are far larger than the rest; mu: few tokens know little of G, so inputs of all
directions alike are mixed in, half a token for each dimension. Over the target

    T = D + W_f E H^-1      minimises   ||R - X T^T||^2 + the damping of (D - T)        (D* of the dense fit)

and, up to a constant, every stored delta Q costs  J(Q) = tr((T - Q) H (T - Q)^T). So one objective serves
all fits: scales (scales.py) and signs (signs.py) minimise J, component after component, then jointly. H and what is
made of it are the same for all modules that read the input.

Whether calibration can be trusted at all is not known beforehand. So each module is first fitted on the fit tokens
and judged by ||R - X Q^T||^2 on held-out tokens, beside the delta that has seen no text (`none`) and no delta at all
(`same`). A fit must win by more than chance would let it, a share 1 / sqrt(tokens that judge) of the error. From
there it goes on, on all tokens: what is reported is the error before that, of tokens that no fit had seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peraxis_format import Axis
from peraxis_tools.compress.fit.adamw import adamw_term
from peraxis_tools.compress.fit.moments.sums import Judge, Moments, Statistics
from peraxis_tools.compress.fit.scales import Term, fit_scales, mean_magnitudes, start_term, stored
from peraxis_tools.compress.fit.signs import Factor, descend, feedback, inverse_factor

__all__ = [
    "AUTO_AXES",
    "FitOptions",
    "FittedMatrix",
    "Matrix",
    "Metric",
    "Quadratic",
    "dense",
    "fit_matrices",
    "fit_terms",
    "metric_of",
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

    Errors are mean squares of the module's output over the tokens that judged: of this fit, of the same terms
    without calibration (error_none), of no delta (error_same). note: why it is not the fit that was asked for.
    """

    terms: tuple[Term, ...]
    error: float
    error_none: float
    error_same: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Metric:
    """H, the factor of its inverse (where signs are chosen), and E H^-1 (where teacher inputs are known); float32."""

    matrix: Tensor
    factor: Factor | None
    carried: Tensor | None


@dataclass(frozen=True, slots=True)
class Quadratic:
    """J(Q) = tr((T - Q) H (T - Q)^T). target: T, float32 [d_out, d_in]; aim: T H."""

    target: Tensor
    aim: Tensor
    metric: Metric


def metric_of(moments: Moments, *, signs: bool, damping: float = _DAMPING) -> Metric | None:
    """The metric of these sums; None where they carry no information (no tokens, or inputs all zero)."""
    diagonal = torch.diagonal(moments.G)
    mean = float(diagonal.mean())
    if not mean > 0.0:
        return None
    metric = moments.G.clone()
    metric.diagonal().add_(damping * diagonal + _PSEUDO_TOKENS * len(metric) / max(moments.tokens, 1) * mean)
    carried = None
    if moments.E is not None:
        carried = torch.cholesky_solve(moments.E.t(), torch.linalg.cholesky(metric)).t().float()
    return Metric(matrix=metric.float(), factor=inverse_factor(metric) if signs else None, carried=carried)


def quadratic(delta: Tensor, fine_tuned: Tensor, metric: Metric) -> Quadratic:
    """The objective of one module. delta, fine_tuned: float32 [d_out, d_in]."""
    target = delta if metric.carried is None else delta + fine_tuned @ metric.carried
    return Quadratic(target=target, aim=target @ metric.matrix, metric=metric)


def residual_terms(delta: Tensor, axes: Sequence[Axis], components: int) -> tuple[Term, ...]:
    """`none`: sign and mean magnitude of the delta, then of what that leaves, and so on; least weight error."""

    def captured(axis: Axis) -> float:
        # Each is a least squares fit, row or col being ones: it takes sum(row^2) sum(col^2) from the sum of squares.
        found = mean_magnitudes(rest, axis)
        return float(found.row.square().sum() * found.col.square().sum())

    terms: list[Term] = []
    rest = delta
    for k in range(components):
        terms.append(start_term(rest, axes[0] if len(axes) == 1 else max(axes, key=captured)))
        if k + 1 < components:
            rest = rest - terms[-1].dense()
    return tuple(terms)


def fit_terms(
    problem: Quadratic, axis: Axis, options: FitOptions, *, components: int = 1, start: Sequence[Term] | None = None
) -> tuple[Term, ...]:
    """Terms of least J: greedily one after the other, then signs and scales in turn, all together.

    start: terms of a problem much like this one, to go on from.
    """
    terms = list(start) if start is not None and options.refine else _greedy(problem, axis, components, options)
    if options.refine:
        if start is None and problem.metric.factor is not None:
            signs = feedback(problem.target, [term.magnitude for term in terms], problem.metric.factor)
            terms = _refit(_with_signs(terms, signs), problem)
        for _ in range(options.rounds):
            signs = descend(
                problem.target,
                [term.magnitude for term in terms],
                [term.signs for term in terms],
                problem.metric.matrix,
                sweeps=options.sweeps,
            )
            terms = _refit(_with_signs(terms, signs), problem)
    elif components > 1:
        for _ in range(options.rounds):
            terms = _refit(terms, problem)
    return tuple(sorted(terms, key=lambda term: -float(term.row.mean() * term.col.mean())))


def _greedy(problem: Quadratic, axis: Axis, components: int, options: FitOptions) -> list[Term]:
    terms: list[Term] = []
    rest, aim = problem.target, problem.aim
    # Scales that signs will follow, and that follow the signs, need not be exact yet.
    rounds = {"rounds": 1} if options.refine else {}
    for _ in range(components):
        terms.append(fit_scales(start_term(rest, axis), rest, problem.metric.matrix, aim=aim, **rounds))
        if len(terms) < components:
            rest = rest - terms[-1].dense()
            aim = rest @ problem.metric.matrix
    return terms


def _with_signs(terms: Sequence[Term], signs: Sequence[Tensor]) -> list[Term]:
    return [replace(term, signs=sign) for term, sign in zip(terms, signs, strict=True)]


def _refit(terms: Sequence[Term], problem: Quadratic) -> list[Term]:
    """The scales of each term in turn, for what the others leave."""
    if len(terms) == 1:
        return [fit_scales(terms[0], problem.target, problem.metric.matrix, aim=problem.aim, rounds=1)]
    rest = problem.target - dense(terms, problem.target)
    refitted = []
    for term in terms:
        rest = rest + term.dense()
        refitted.append(fit_scales(term, rest, problem.metric.matrix, rounds=1))
        rest = rest - refitted[-1].dense()
    return refitted


def dense(terms: Sequence[Term], like: Tensor) -> Tensor:
    """The sum of the terms, one rounding a term as SPEC 6.1 adds them; zeros like `like` where there are none."""
    total = torch.zeros_like(like)
    for term in terms:
        total = total + term.dense()
    return total


@dataclass(frozen=True, slots=True)
class _Trial:
    """A matrix fitted on the fit tokens. fitted: what it would be without more; start: terms to go on from."""

    fitted: FittedMatrix
    start: tuple[Term, ...] = ()
    axis: Axis | None = None


def fit_matrices(matrices: Sequence[Matrix], *, statistics: Statistics, options: FitOptions) -> list[FittedMatrix]:
    """Fit the matrices that read one input. Uses the statistics up: held-out tokens end in the fit.

    Never worse than `none` and `same` where it was judged; errors are those of the rounded weight.
    """
    metric = None if options.adamw_steps else metric_of(statistics.fit, signs=options.refine)
    judging = statistics.judging.single()
    # Signs by feedback alone say whether calibration helps; the rounds then run once, on all tokens.
    first = replace(options, rounds=0) if options.refine and statistics.held_out.tokens else options
    trials = [_try(matrix, metric, judging, statistics.fit, first) for matrix in matrices]
    del judging
    if not statistics.held_out.tokens or all(trial.axis is None for trial in trials):
        return [trial.fitted for trial in trials]
    statistics.fit.absorb(statistics.held_out)
    # Signs go on from those of the trial: no feedback, and no factor.
    metric = metric_of(statistics.fit, signs=False)
    return [_finish(matrix, trial, metric, options) for matrix, trial in zip(matrices, trials, strict=True)]


def _try(matrix: Matrix, metric: Metric | None, judging: Moments, moments: Moments, options: FitOptions) -> _Trial:
    delta = matrix.fine_tuned - matrix.base
    judge = Judge(matrix.fine_tuned, judging)

    def error(terms: Sequence[Term]) -> float:
        applied = (matrix.base + dense(terms, matrix.base)).to(matrix.dtype).float()
        return judge.error(matrix.fine_tuned - applied)

    plain = tuple(map(stored, residual_terms(delta, matrix.axes, matrix.components)))
    error_none, error_same = error(plain), error(())
    fitted = FittedMatrix(terms=plain, error=error_none, error_none=error_none, error_same=error_same)
    if options.adamw_steps:
        return _Trial(_fit_adamw(fitted, matrix, delta, moments, options, error))
    margin = 1.0 - max(judge.tokens, 1) ** -0.5
    if metric is not None:
        problem = quadratic(delta, matrix.fine_tuned, metric)
        axis = _axis(matrix, problem, moments.tokens, error)
        start = fit_terms(problem, axis, options, components=matrix.components)
        terms = tuple(map(stored, start))
        found = error(terms)
        if found < margin * min(error_none, error_same):
            return _Trial(replace(fitted, terms=terms, error=found), start, axis)
    if judge.tokens and error_same <= margin * error_none:
        return _Trial(replace(fitted, terms=(), error=error_same, note="no delta lowers the held-out error: base kept"))
    why = "no calibration token reaches it" if metric is None else "calibration does not improve it"
    return _Trial(replace(fitted, note=f"{why}: mean |delta|"))


def _axis(matrix: Matrix, problem: Quadratic, tokens: int, error: Callable[[Sequence[Term]], float]) -> Axis:
    """row+col holds the others as special cases; where tokens are so few that it might fit noise, the best by scales
    alone on held-out tokens.
    """
    if len(matrix.axes) == 1:
        return matrix.axes[0]
    if Axis.ROW_COL in matrix.axes and tokens >= matrix.base.shape[1]:
        return Axis.ROW_COL
    quick = FitOptions(refine=False)

    def scales_alone(axis: Axis) -> float:
        return error(tuple(map(stored, fit_terms(problem, axis, quick, components=matrix.components))))

    return min(matrix.axes, key=scales_alone)


def _finish(matrix: Matrix, trial: _Trial, metric: Metric | None, options: FitOptions) -> FittedMatrix:
    if trial.axis is None or metric is None:
        return trial.fitted
    problem = quadratic(matrix.fine_tuned - matrix.base, matrix.fine_tuned, metric)
    terms = fit_terms(problem, trial.axis, options, components=matrix.components, start=trial.start)
    return replace(trial.fitted, terms=tuple(map(stored, terms)))


def _fit_adamw(
    plain: FittedMatrix,
    matrix: Matrix,
    delta: Tensor,
    moments: Moments,
    options: FitOptions,
    error: Callable[[Sequence[Term]], float],
) -> FittedMatrix:
    """The paper's fit; like the paper, without a look at whether it is better than no fit."""
    if not moments.tokens:
        return replace(plain, note="no calibration token reaches it: mean |delta|")
    terms = [stored(adamw_term(delta, matrix.fine_tuned, moments, a, steps=options.adamw_steps)) for a in matrix.axes]
    best = min(terms, key=lambda term: error((term,)))
    return replace(plain, terms=(best,), error=error((best,)))
