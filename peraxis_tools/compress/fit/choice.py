"""Choose the fit of a module: candidates are fitted on one text and validated on another.

    refined   signs and scales, if requested
    scales    signs of the delta, scales in closed form
    scalar    the same with one scale for the whole module, which cannot overfit to one text
    none      signs and mean magnitudes, without a text
    same      no delta, the base's own weight

A fit on one text is validated on another: a fit on the calibration text by the samples that the fine-tuned model
generated, and the reverse (two directions). With a single text, its held-out samples validate. The error is
||R - X Q^T||^2 (sums.py) of the weight as apply rounds it. A direction counts if its fit has at least as many tokens as
the module has inputs; with fewer, every fit would look worse than the final one.

The first of refined, scales and scalar that is never worse than the scalar is taken. It must then be better than `none`
and `same` by more than chance, a share 1 / sqrt(validation tokens). The chosen fit is repeated on all tokens; the
reported errors are those of the first fit, on tokens that it had not seen.

Of the correction (fit.py) a fit takes all, or the share s of least error on the validation tokens if scales fitted to
that are better there. (Signs and scales average out much of the noise that would be in a dense weight, for which s is
best.) What is not noise is the same for any number of tokens, and noise has a variance of 1 / tokens, so s becomes
r s / (1 + (r - 1) s) for r times the tokens, on which the chosen fit is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from torch import Tensor

from peraxis_format import Axis
from peraxis_tools.compress.fit.adamw import adamw_component
from peraxis_tools.compress.fit.fit import (
    FitOptions,
    FittedMatrix,
    Hessian,
    Matrix,
    Quadratic,
    dense,
    fit_components,
    hessian_of,
    mean_components_of,
    quadratic,
)
from peraxis_tools.compress.fit.moments.sums import Moments, Statistics, Validation
from peraxis_tools.compress.fit.rows import fit_used_rows, has_unused_rows
from peraxis_tools.compress.fit.scalars import fit_scalars
from peraxis_tools.compress.fit.scales import ComponentFit, round_scales_f16
from peraxis_tools.compress.shared_sizes import TRIAL_ROWS

__all__ = ["fit_matrices"]

_REFINED: Final = "refined"
_SCALES: Final = "scales"
_SCALAR: Final = "scalar"
_NONE: Final = "none"
_SAME: Final = "same"
_TRIAL_SWEEPS: Final = 2  # one round of these is enough for a trial, as TRIAL_ROWS are
_NOTES: Final = {
    _SCALES: "refined signs are worse than one scale on another text: scales alone",
    _SCALAR: "worse than one scale on another text: one scale",
    _SAME: "no delta lowers the held-out error; base used",
}


def fit_matrices(matrices: Sequence[Matrix], *, statistics: Statistics, options: FitOptions) -> list[FittedMatrix]:
    """Fit the matrices that read one input. This consumes `statistics`: all tokens are merged into the fit's.

    On the validation tokens the result is never worse than one scale, `none` and `same`; errors are those of the
    rounded weight.
    """
    if options.adamw_steps:
        return [_fit_adamw(matrix, statistics, options) for matrix in matrices]
    trials = [_Trial(matrix, options, statistics.tokens) for matrix in matrices]
    for i, (fit, validation) in enumerate(statistics.directions()):
        _add_direction(trials, fit, validation, first=i == 0)
    kinds = [trial.kind() for trial in trials]
    hessian = None
    if any(kind in (_REFINED, _SCALES, _SCALAR) for kind in kinds):
        hessian = hessian_of(statistics.merged(), signs=_REFINED in kinds)
    return [trial.finished(kind, hessian) for trial, kind in zip(trials, kinds, strict=True)]


def _add_direction(trials: Sequence[_Trial], fit: Moments, validation: Moments, *, first: bool) -> None:
    """Add a direction to all trials. Its Hessian is free again when this returns."""
    hessian = hessian_of(fit, signs=False)
    if hessian is None and not first:
        return  # all inputs are zero, so the first result is final
    for trial in trials:
        trial.add(hessian, validation, fit.tokens)


class _Trial:
    """The candidates of one matrix on a sample of its rows, and their errors in each direction."""

    def __init__(self, matrix: Matrix, options: FitOptions, tokens: int) -> None:
        self._matrix, self._options, self._all_tokens = matrix, options, tokens
        rows = slice(None, None, max(1, len(matrix.base) // TRIAL_ROWS))
        self._some = matrix.rows(rows)
        self._plain = _plain(self._some)
        self._all_rows = len(matrix.base) / len(self._some.base)  # for each row of the sample
        self._axis = matrix.axes[0] if len(matrix.axes) == 1 else None
        self._errors: dict[str, list[float]] = {}
        self._tokens: list[int] = []
        self._shares: list[float] = []  # of the correction, for as many tokens as the final fit has

    def add(self, hessian: Hessian | None, held_out: Moments, tokens: int) -> None:
        """Add a direction: the candidates of this Hessian, of so many tokens, validated on others."""
        validation = Validation(self._some.fine_tuned, held_out)
        self._tokens.append(max(validation.tokens, 1))
        candidates: dict[str, Sequence[ComponentFit]] = {_NONE: self._plain, _SAME: ()}
        if hessian is not None:
            candidates.update(self._fitted(hessian, validation, self._all_tokens / max(tokens, 1)))
        for kind, components in candidates.items():
            self._errors.setdefault(kind, []).append(self._error(components, validation))

    def _fitted(self, hessian: Hessian, validation: Validation, times: float) -> Mapping[str, Sequence[ComponentFit]]:
        """The candidates of this Hessian. times: the tokens of the final fit for each of this one."""
        light = replace(self._options, refine=True, rounds=0)
        correction = hessian.correction(self._some.fine_tuned)
        tried: list[tuple[float, float, Quadratic, tuple[ComponentFit, ...]]] = []
        for share in sorted({validation.share(correction), 1.0}):
            problem = quadratic(self._some.delta + share * correction, hessian)
            axis = self._axis = self._axis or self._best_axis(problem, validation)
            scales = self._components(problem, axis, light)
            tried.append((self._error(_rounded(scales), validation), share, problem, scales))
        _, share, problem, scales = min(tried, key=lambda each: each[0])
        self._shares.append(_share_of_all(share, times))
        found = {_SCALES: _rounded(scales)}
        if Axis.TENSOR in self._matrix.axes:
            found[_SCALAR] = _rounded(self._components(problem, Axis.TENSOR, light))
        if self._options.refine:
            found[_REFINED] = _rounded(
                fit_components(problem, axis, replace(light, rounds=1, sweeps=_TRIAL_SWEEPS), start=scales)
            )
        return found

    def _best_axis(self, problem: Quadratic, validation: Validation) -> Axis:
        """Choose the axis: row+col, which contains the others, or with few tokens (where it might fit noise) the best
        by scales alone.
        """
        if Axis.ROW_COL in self._matrix.axes and self._all_tokens >= self._matrix.base.shape[1]:
            return Axis.ROW_COL
        scales = FitOptions(refine=False)
        return min(
            self._matrix.axes,
            key=lambda axis: self._error(_rounded(self._components(problem, axis, scales)), validation),
        )

    def _components(self, problem: Quadratic, axis: Axis, options: FitOptions) -> tuple[ComponentFit, ...]:
        return fit_components(problem, axis, options, components=self._matrix.components)

    def _error(self, components: Sequence[ComponentFit], validation: Validation) -> float:
        found: float = validation.error(self._some.fine_tuned - _applied(self._some, components))
        return self._all_rows * found

    def kind(self) -> str:
        """The chosen candidate."""
        errors = self._errors
        fits = [kind for kind in (_REFINED, _SCALES, _SCALAR) if kind in errors]
        if fits:
            floor = errors[fits[-1]]
            taken = next((k for k in fits if _nowhere_worse(errors[k], floor)), fits[-1])
            least = [min(pair) for pair in zip(errors[_NONE], errors[_SAME], strict=True)]
            if _quotient(errors[taken], least) < self._margin:
                return taken
        return _SAME if self._all_tokens and _quotient(errors[_SAME], errors[_NONE]) <= self._margin else _NONE

    @property
    def _margin(self) -> float:
        return 1.0 - 1.0 / math.sqrt(sum(self._tokens))

    def finished(self, kind: str, hessian: Hessian | None) -> FittedMatrix:
        """The candidate on all tokens."""
        components: Sequence[ComponentFit] = _plain(self._matrix) if kind == _NONE else ()
        if hessian is not None and kind in (_REFINED, _SCALES, _SCALAR):
            axis = Axis.TENSOR if kind == _SCALAR else self._axis or Axis.TENSOR
            components = _rounded(self._on_all(hessian, axis, refined=kind == _REFINED))
        asked = _REFINED if self._options.refine else _SCALES
        note = "" if kind == asked else _NOTES.get(kind) or self._why_none()
        return FittedMatrix(
            components=tuple(components),
            error=self._mean(kind),
            error_none=self._mean(_NONE),
            error_same=self._mean(_SAME),
            note=note,
        )

    def _on_all(self, hessian: Hessian, axis: Axis, *, refined: bool) -> tuple[ComponentFit, ...]:
        matrix, options = self._matrix, self._options if refined else FitOptions(refine=False)
        share = sum(self._shares) / len(self._shares)
        if axis is Axis.TENSOR and not refined:
            return fit_scalars(matrix, hessian, share=share, rounds=options.rounds)
        if has_unused_rows(matrix, axis):
            return fit_used_rows(matrix, axis, hessian, options, share=share)
        whole = matrix.rows()
        target = whole.delta.add_(hessian.correction(whole.fine_tuned), alpha=share)
        del whole
        return self._components(quadratic(target, hessian), axis, options)

    def _why_none(self) -> str:
        why = "calibration does not improve it" if _SCALES in self._errors else "no calibration token reaches it"
        return f"{why}: mean |delta|"

    def _mean(self, kind: str) -> float:
        """The mean error over all validation tokens."""
        total = sum(error * n for error, n in zip(self._errors[kind], self._tokens, strict=True))
        return total / sum(self._tokens)


def _share_of_all(share: float, times: float) -> float:
    """Return the share of the correction for `times` as many tokens (formula above)."""
    return times * share / (1.0 + (times - 1.0) * share)


def _nowhere_worse(errors: Sequence[float], than: Sequence[float]) -> bool:
    return all(error <= other for error, other in zip(errors, than, strict=True))


def _quotient(errors: Sequence[float], of: Sequence[float]) -> float:
    """The mean over directions of the quotient of two errors, so that each text has equal weight; 1 for 0 / 0."""
    shares = [error / other if other > 0 else 1.0 + error for error, other in zip(errors, of, strict=True)]
    return sum(shares) / len(shares)


def _plain(matrix: Matrix) -> tuple[ComponentFit, ...]:
    """`none`."""
    return _rounded(mean_components_of(matrix.delta, matrix.axes, matrix.components))


def _rounded(components: Sequence[ComponentFit]) -> tuple[ComponentFit, ...]:
    return tuple(map(round_scales_f16, components))


def _applied(matrix: Matrix, components: Sequence[ComponentFit]) -> Tensor:
    """The weight that apply gives, float32. matrix: in float32."""
    return (matrix.base + dense(components, matrix.base)).to(matrix.dtype).float()


def _fit_adamw(matrix: Matrix, statistics: Statistics, options: FitOptions) -> FittedMatrix:
    """The paper's fit. Like the paper, it does not check that the fit is better than none."""
    matrix = matrix.rows()
    (_, held_out), *_ = statistics.directions()
    validation = Validation(matrix.fine_tuned, held_out)

    def error(components: Sequence[ComponentFit]) -> float:
        return validation.error(matrix.fine_tuned - _applied(matrix, components))

    plain = _plain(matrix)
    error_none, error_same = error(plain), error(())
    fitted = FittedMatrix(components=plain, error=error_none, error_none=error_none, error_same=error_same)
    if not statistics.fit.tokens:
        return replace(fitted, note="no calibration token reaches it: mean |delta|")
    components = [
        round_scales_f16(adamw_component(matrix.delta, matrix.fine_tuned, statistics.fit, a, steps=options.adamw_steps))
        for a in matrix.axes
    ]
    best = min(components, key=lambda component: error((component,)))
    return replace(fitted, components=(best,), error=error((best,)))
