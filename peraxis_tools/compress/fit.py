"""One module, from its sums to its stored delta.

With lambda a damping relative to the mean diagonal of G, and H = G + lambda I, the target

    T = D + W_f E H^-1      minimises   ||R - X T^T||^2 + lambda ||D - T||^2        (D* of the dense fit)

and, up to a constant, every stored delta Q costs  J(Q) = tr((T - Q) H (T - Q)^T). So one objective serves
all fits: scales (scales.py) and signs (signs.py) minimise J, component after component, then jointly.

What is not known beforehand is how far the fit tokens can be trusted. So variants (axis; damping) are fitted
on the fit tokens and judged by ||R - X Q^T||^2 on held-out tokens, beside the delta that has seen no text (`none`)
and no delta at all (`same`). A fit must win by more than chance would let it, a share 1 / sqrt(tokens that judge) of
the error; the best is then fitted once more on all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peraxis_format import Axis
from peraxis_tools.compress.adamw import adamw_term
from peraxis_tools.compress.scales import Term, fit_scales, start_term, stored
from peraxis_tools.compress.signs import descend, feedback, inverse_factor
from peraxis_tools.compress.statistics import Moments, Statistics, squared_error

__all__ = ["FitOptions", "FittedMatrix", "Quadratic", "dense", "fit_matrix", "fit_terms", "quadratic", "residual_terms"]

# Few tokens know little of G: inputs of all directions alike are mixed in, a tenth of a token for each dimension.
_PSEUDO_TOKENS = 0.1
AUTO_AXES = (Axis.ROW, Axis.COL, Axis.ROW_COL, Axis.TENSOR)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """How one matrix is fitted.

    axes: candidates. components: masks, 1 to 8. refine: choose signs, not only scales. adamw_steps: above 0,
    the paper's fit with so many steps in place of all else. dampings: candidates for
    lambda / mean diag G. rounds: alternations of signs and scales. sweeps: of coordinate descent in each.
    """

    axes: tuple[Axis, ...] = AUTO_AXES
    components: int = 1
    refine: bool = True
    adamw_steps: int = 0
    dampings: tuple[float, ...] = (0.02, 0.1, 0.5)
    rounds: int = 3
    sweeps: int = 2


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
    damping: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Quadratic:
    """J(Q) = tr((T - Q) H (T - Q)^T). target float32 [d_out, d_in], metric float32 [d_in, d_in], factor of H^-1."""

    target: Tensor
    metric: Tensor
    factor: tuple[Tensor, Tensor]


def quadratic(delta: Tensor, fine_tuned: Tensor, moments: Moments, damping: float) -> Quadratic | None:
    """The objective for these sums; None where they carry no information (no tokens, or inputs all zero)."""
    scale = float(torch.diagonal(moments.G).mean())
    if not scale > 0.0:
        return None
    metric = moments.G.clone()
    metric.diagonal().add_((damping + _PSEUDO_TOKENS * len(metric) / max(moments.tokens, 1)) * scale)
    target = delta
    if moments.E is not None:
        solved = torch.cholesky_solve(moments.E.t(), torch.linalg.cholesky(metric)).t()
        target = delta + fine_tuned @ solved.float()
    return Quadratic(target=target, metric=metric.float(), factor=inverse_factor(metric))


def residual_terms(delta: Tensor, axes: Sequence[Axis], components: int) -> tuple[Term, ...]:
    """`none`: sign and mean magnitude of the delta, then of what that leaves, and so on; least weight error."""
    terms: list[Term] = []
    rest = delta
    for _ in range(components):
        candidates = [start_term(rest, axis) for axis in axes]
        terms.append(min(candidates, key=lambda term: float((rest - term.dense()).square().sum())))
        rest = rest - terms[-1].dense()
    return tuple(terms)


def fit_terms(problem: Quadratic, axis: Axis, options: FitOptions) -> tuple[Term, ...]:
    """Terms of least J: greedily one after the other, then signs and scales in turn, all together."""
    terms: list[Term] = []
    rest = problem.target
    for _ in range(options.components):
        term = fit_scales(start_term(rest, axis), rest, problem.metric)
        terms.append(term)
        rest = rest - term.dense()
    for _ in range(options.rounds if options.refine else 0):
        magnitudes = [term.magnitude for term in terms]
        signs = feedback(problem.target, magnitudes, problem.factor)
        signs = descend(problem.target, magnitudes, signs, problem.metric, sweeps=options.sweeps)
        terms = [replace(term, signs=sign) for term, sign in zip(terms, signs, strict=True)]
        terms = _refit(terms, problem)
    if not options.refine and options.components > 1:
        for _ in range(options.rounds):
            terms = _refit(terms, problem)
    return tuple(sorted(terms, key=lambda term: -float(term.row.mean() * term.col.mean())))


def _refit(terms: list[Term], problem: Quadratic) -> list[Term]:
    rest = problem.target - sum(term.dense() for term in terms)
    refitted = []
    for term in terms:
        rest = rest + term.dense()
        refitted.append(fit_scales(term, rest, problem.metric, rounds=1))
        rest = rest - refitted[-1].dense()
    return refitted


def dense(terms: Sequence[Term], like: Tensor) -> Tensor:
    """The sum of the terms, one rounding a term as SPEC 6.1 adds them; zeros like `like` where there are none."""
    total = torch.zeros_like(like)
    for term in terms:
        total = total + term.dense()
    return total


@dataclass(frozen=True, slots=True)
class _Variant:
    """A fit that held-out tokens have judged."""

    error: float
    axis: Axis
    damping: float


def fit_matrix(
    base: Tensor, fine_tuned: Tensor, *, dtype: torch.dtype, statistics: Statistics, options: FitOptions
) -> FittedMatrix:
    """Fit one matrix. base, fine_tuned: float32 [d_out, d_in]; dtype: what base + delta is rounded to when applied.

    Never worse than `none` and `same` where it was judged; errors are those of the rounded weight.
    """
    judge = statistics.held_out if statistics.held_out.tokens else statistics.fit
    delta = fine_tuned - base

    def error(terms: Sequence[Term]) -> float:
        applied = (base + dense(terms, base)).to(dtype).float()
        return squared_error(fine_tuned - applied, fine_tuned, judge) / max(judge.tokens, 1)

    plain = tuple(map(stored, residual_terms(delta, options.axes, options.components)))
    error_none, error_same = error(plain), error(())
    fitted = FittedMatrix(terms=plain, error=error_none, error_none=error_none, error_same=error_same)
    if options.adamw_steps:
        return _fit_adamw(fitted, delta, fine_tuned, statistics.fit, options, error)
    best = _choose(delta, fine_tuned, statistics.fit, options, error)
    margin = 1.0 - max(judge.tokens, 1) ** -0.5
    if best is not None and best.error < margin * min(error_none, error_same):
        problem = quadratic(delta, fine_tuned, statistics.total, best.damping)
        if problem is not None:
            terms = tuple(map(stored, fit_terms(problem, best.axis, options)))
            return replace(fitted, terms=terms, error=best.error, damping=best.damping)
    if judge.tokens and error_same <= margin * error_none:
        return replace(fitted, terms=(), error=error_same, note="no delta lowers the held-out error: base kept")
    why = "no calibration token reaches it" if best is None else "calibration does not improve it"
    return replace(fitted, note=f"{why}: mean |delta|")


def _fit_adamw(
    plain: FittedMatrix,
    delta: Tensor,
    fine_tuned: Tensor,
    moments: Moments,
    options: FitOptions,
    error: Callable[[Sequence[Term]], float],
) -> FittedMatrix:
    """The paper's fit; like the paper, without a look at whether it is better than no fit."""
    if not moments.tokens:
        return replace(plain, note="no calibration token reaches it: mean |delta|")
    terms = [stored(adamw_term(delta, fine_tuned, moments, a, steps=options.adamw_steps)) for a in options.axes]
    best = min(terms, key=lambda term: error((term,)))
    return replace(plain, terms=(best,), error=error((best,)))


def _choose(
    delta: Tensor,
    fine_tuned: Tensor,
    moments: Moments,
    options: FitOptions,
    error: Callable[[Sequence[Term]], float],
) -> _Variant | None:
    """The variant of least held-out error: the axis by scales alone, then the damping by a first round of signs.

    Its error is that of the fit that was asked for. None without tokens.
    """
    problems: dict[float, Quadratic] = {}
    for damping in options.dampings:
        problem = quadratic(delta, fine_tuned, moments, damping)
        if problem is None:
            return None
        problems[damping] = problem
    quick = replace(options, refine=False)

    def trial(damping: float, axis: Axis, how: FitOptions) -> _Variant:
        return _Variant(error(tuple(map(stored, fit_terms(problems[damping], axis, how)))), axis, damping)

    middle = options.dampings[len(options.dampings) // 2]
    best = min((trial(middle, axis, quick) for axis in options.axes), key=lambda variant: variant.error)
    short = replace(options, rounds=1)
    best = min((trial(damping, best.axis, short) for damping in options.dampings), key=lambda variant: variant.error)
    return trial(best.damping, best.axis, options) if options.refine else best
