"""The choice of a module's fit if two texts validate each other."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from peraxis_format import Axis
from peraxis_tools.compress.calibration.partition import halves, partition
from peraxis_tools.compress.fit.choice import fit_matrices
from peraxis_tools.compress.fit.fit import (
    FitOptions,
    FittedMatrix,
    Matrix,
    dense,
    fit_components,
    hessian_of,
    quadratic,
)
from peraxis_tools.compress.fit.moments.sums import Moments, Statistics, Validation

D_OUT, D_IN = 40, 48


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(D_OUT, D_IN, generator=g)
    return base, base + 0.1 * torch.randn(D_OUT, D_IN, generator=g)


def inputs(tokens: int, *, seed: int, within: slice = slice(None)) -> torch.Tensor:
    """Return inputs [tokens, d_in] along some directions of an orthogonal basis, and a tenth of it along the others."""
    g = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=g)).Q
    size = torch.full((D_IN,), 0.02)
    size[within] = 1.0
    drawn = torch.randn(tokens, D_IN, generator=torch.Generator().manual_seed(seed))
    found: torch.Tensor = (drawn * size) @ basis
    return found


def moments_of(x: torch.Tensor) -> Moments:
    moments = Moments.zeros(D_IN, paired=False, validates=False)
    moments.add(x)
    return moments


def fitted(texts: Sequence[torch.Tensor], **how: object) -> FittedMatrix:
    base, tuned = pair()
    one, other = (moments_of(x) for x in texts)
    matrix = Matrix(base=base, fine_tuned=tuned, dtype=torch.float32)
    statistics = Statistics(fit=one, validation=other, crossed=True)
    return fit_matrices([matrix], statistics=statistics, options=FitOptions(**how))[0]  # type: ignore[arg-type]


def error_on(x: torch.Tensor, found: torch.Tensor) -> float:
    base, tuned = pair()
    return Validation(tuned, moments_of(x)).error(tuned - base - found)


def scalar(texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the weight with one closed-form scale for all tokens."""
    base, tuned = pair()
    hessian = hessian_of(moments_of(torch.cat(list(texts))), signs=False)
    assert hessian is not None
    problem = quadratic(tuned - base + hessian.correction(tuned), hessian)
    return dense(fit_components(problem, Axis.TENSOR, FitOptions(refine=False)), base)


ALIKE = [inputs(800, seed=1, within=slice(0, 24)), inputs(300, seed=2, within=slice(0, 24))]
APART = [inputs(800, seed=1, within=slice(0, 24)), inputs(300, seed=2, within=slice(24, 48))]


@pytest.mark.parametrize("texts", [ALIKE, APART], ids=["alike", "apart"])
@pytest.mark.parametrize("refine", [False, True])
def test_no_text_is_worse_off_than_with_one_closed_form_scale(texts: list[torch.Tensor], refine: bool) -> None:
    base, _ = pair()
    found = dense(fitted(texts, refine=refine).components, base)
    for x in texts:
        assert error_on(x, found) <= 1.001 * error_on(x, scalar(texts))


def test_signs_that_hold_on_another_text_are_kept() -> None:
    base, _ = pair()
    result = fitted(ALIKE)
    assert result.note == ""
    assert error_on(ALIKE[1], dense(result.components, base)) < 0.5 * error_on(ALIKE[1], scalar(ALIKE))


def test_signs_that_follow_one_text_against_the_other_are_given_up_and_it_is_said() -> None:
    result = fitted(APART)
    assert result.note
    assert result.error < result.error_same
    # The second text must decide, because with only the first text the signs would be kept.
    base, tuned = pair()
    alone = Statistics(fit=moments_of(APART[0][:600]), validation=moments_of(APART[0][600:]))
    matrix = Matrix(base=base, fine_tuned=tuned, dtype=torch.float32)
    assert fit_matrices([matrix], statistics=alone, options=FitOptions())[0].note == ""


def test_a_text_of_fewer_tokens_than_inputs_validates_but_is_not_validated() -> None:
    many, few = moments_of(ALIKE[0]), moments_of(ALIKE[1][: D_IN - 1])
    for fit, validation in ((many, few), (few, many)):
        ways = Statistics(fit=fit, validation=validation, crossed=True).directions()
        assert [(way[0] is many, way[1] is few) for way in ways] == [(True, True)]
    assert len(Statistics(fit=many, validation=moments_of(ALIKE[1]), crossed=True).directions()) == 2


def test_the_last_of_several_texts_stands_against_the_others_and_a_single_one_is_split() -> None:
    import numpy as np

    texts = [np.full((n, 4), i, dtype=np.int64) for i, n in enumerate((10, 6, 5))]
    several = halves(partition(texts, calibration=1.0, validation=0.2), crossed=True)
    assert several.crossed
    assert set(several.fit.flat) == {0, 1}
    assert set(several.validation.flat) == {2}
    assert len(several.fit) + len(several.validation) == 21
    for parts, crossed in (
        (partition(texts[:1], calibration=1.0, validation=0.2), True),
        (partition(texts, calibration=1.0, validation=0.2), False),
    ):
        split = halves(parts, crossed=crossed)
        assert not split.crossed
        assert set(split.fit.flat) == set(split.validation.flat)


def test_rows_that_the_text_does_not_use_follow_in_closed_form_and_the_used_ones_lose_nothing() -> None:
    g = torch.Generator().manual_seed(3)
    base = torch.randn(4000, D_IN, generator=g)
    tuned = base + 0.1 * torch.randn(4000, D_IN, generator=g) * torch.rand(4000, 1, generator=g)
    used = torch.zeros(4000, dtype=torch.bool)
    used[::9] = True
    found = {}
    for name, rows in {"all": None, "used": used}.items():
        statistics = Statistics(fit=moments_of(ALIKE[0]), validation=moments_of(ALIKE[1]), crossed=True)
        matrix = Matrix(base=base, fine_tuned=tuned, dtype=torch.float32, components=2, used=rows)
        result = fit_matrices([matrix], statistics=statistics, options=FitOptions())[0]
        residual = tuned - base - dense(result.components, base)
        moments = moments_of(torch.cat(ALIKE))
        found[name] = [Validation(tuned[part], moments).error(residual[part]) for part in (used, ~used)]
        nothing = [Validation(tuned[part], moments).error((tuned - base)[part]) for part in (used, ~used)]
    assert found["used"][0] <= 1.05 * found["all"][0]
    # Signs of the delta with a scale for each row are much better than no delta, and worse than refined signs.
    assert found["all"][1] < found["used"][1] < 0.25 * nothing[1]
