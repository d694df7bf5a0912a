"""One scale for each component, fitted part by part, is what the fit of a whole matrix in memory gives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from peraxis_format import Axis
from peraxis_tools.compress.fit import scalars
from peraxis_tools.compress.fit.fit import FitOptions, Hessian, Matrix, dense, fit_components, hessian_of, quadratic
from peraxis_tools.compress.fit.moments.sums import Moments
from peraxis_tools.compress.fit.scalars import fit_scalars
from peraxis_tools.compress.fit.scales import ComponentFit

D_OUT, D_IN, TOKENS = 90, 16, 60


def table(components: int) -> Matrix:
    g = torch.Generator().manual_seed(1)
    base = torch.randn(D_OUT, D_IN, generator=g)
    moved = base + 0.02 * torch.randn(D_OUT, D_IN, generator=g) + 0.03
    return Matrix(base=base, fine_tuned=moved, dtype=torch.float32, components=components)


def known() -> Hessian:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, D_IN, generator=g) @ torch.randn(D_IN, D_IN, generator=g)
    moments = Moments.zeros(D_IN, paired=True, validates=False)
    moments.add(x, 1.01 * x)
    hessian = hessian_of(moments, signs=False)
    assert hessian is not None
    return hessian


@pytest.mark.parametrize("components", [1, 2, 5])
@pytest.mark.parametrize("share", [0.0, 0.7])
def test_the_error_is_that_of_the_whole_matrix(components: int, share: float) -> None:
    its, hessian = table(components), known()
    target = its.delta + share * hessian.correction(its.fine_tuned)

    def error(terms: Sequence[ComponentFit]) -> float:
        rest = target - dense(terms, target)
        return float(torch.sum((rest @ hessian.matrix) * rest))

    options = FitOptions(refine=False)
    whole = fit_components(quadratic(target, hessian), Axis.TENSOR, options, components=components)
    found = fit_scalars(its, hessian, share=share, rounds=options.rounds)
    assert error(found) == pytest.approx(error(whole), rel=1e-4)
    assert [term.axis for term in found] == [Axis.TENSOR] * components
    sizes = [float(term.row[0]) for term in found]
    assert sizes == sorted(sizes, reverse=True)
    assert all(bool((term.row >= 0).all()) for term in found)


def test_the_size_of_a_part_changes_no_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    its, hessian = table(3), known()
    whole = fit_scalars(its, hessian, share=0.5, rounds=3)
    monkeypatch.setattr(scalars, "_ROWS", 7)
    for one, other in zip(whole, fit_scalars(its, hessian, share=0.5, rounds=3), strict=True):
        assert torch.equal(one.signs, other.signs)
        assert torch.allclose(one.row, other.row, rtol=1e-5)


def test_rounds_never_make_it_worse() -> None:
    its, hessian = table(4), known()
    target = its.delta

    def error(rounds: int) -> float:
        rest = target - dense(fit_scalars(its, hessian, share=0.0, rounds=rounds), target)
        return float(torch.sum((rest @ hessian.matrix) * rest))

    assert error(3) <= error(1) <= error(0)


def test_an_empty_hessian_gives_zero_scales() -> None:
    its = table(2)
    nothing = Hessian(matrix=torch.zeros(D_IN, D_IN), factor=None, cross=None, lower=None)
    assert all(float(term.row.abs().max()) == 0.0 for term in fit_scalars(its, nothing, share=1.0, rounds=3))
