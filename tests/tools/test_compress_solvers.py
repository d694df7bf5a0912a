"""Systems that a fit solves in float32 agree with float64, and a solver that cannot says so."""

from __future__ import annotations

import pytest
import torch

from peraxis_format import Axis
from peraxis_tools.compress.fit import scales
from peraxis_tools.compress.fit.fit import hessian_of
from peraxis_tools.compress.fit.moments.sums import Moments
from peraxis_tools.compress.fit.scales import conjugate_gradients, fit_scales, start_component


def signs_system(rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A system as the scales of columns have it, with ones on its diagonal, and a right side."""
    g = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (rows, width), generator=g).float().mul_(2).sub_(1)
    x = torch.randn(4 * width, width, generator=g) @ torch.randn(width, width, generator=g)
    correlation = torch.corrcoef(x.t())
    return correlation * (signs.t() @ signs / rows), torch.randn(width, generator=g)


def pair_moments(sizes: torch.Tensor, *, tokens: int = 300, seed: int = 0) -> Moments:
    """Moments of correlated inputs of these sizes, with a teacher's that differ a little."""
    g = torch.Generator().manual_seed(seed)
    width = len(sizes)
    x = torch.randn(tokens, width, generator=g) @ torch.randn(width, width, generator=g) * sizes
    moments = Moments.zeros(width, paired=True, validates=True)
    moments.add(x, x + 0.05 * torch.randn(tokens, width, generator=g) * sizes)
    return moments


@pytest.mark.parametrize("rows", [16, 128, 600])
@pytest.mark.parametrize("width", [1, 7, 96])
def test_conjugate_gradients_solve_the_system_of_the_columns(rows: int, width: int) -> None:
    system, right = signs_system(rows, width)
    expected = torch.linalg.solve(system.double(), right.double())
    found = conjugate_gradients(system, right, torch.zeros_like(right))
    if found is not None:  # few rows may need more steps; then a factor is computed
        residual = system.double() @ found.double() - right.double()
        assert float(residual.norm()) <= 1e-4 * float(right.norm())
        assert torch.allclose(found.double(), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    assert found is not None or rows < width


def test_conjugate_gradients_from_the_solution_keep_it() -> None:
    system, right = signs_system(128, 48)
    expected = torch.linalg.solve(system, right)
    found = conjugate_gradients(system, right, expected)
    assert found is not None
    assert torch.allclose(found, expected, atol=1e-4)


def test_an_indefinite_system_has_no_solution() -> None:
    system = torch.diag(torch.tensor([1.0, -1.0, 1.0]))
    assert conjugate_gradients(system, torch.ones(3), torch.zeros(3)) is None


def test_a_solution_that_the_steps_do_not_reach_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "_STEPS", 1)
    system, right = signs_system(128, 48)
    assert conjugate_gradients(system, right, torch.zeros_like(right)) is None


def test_a_right_side_of_zeros_gives_zeros() -> None:
    system, right = signs_system(128, 48)
    found = conjugate_gradients(system, torch.zeros_like(right), torch.zeros_like(right))
    assert found is not None
    assert not found.any()


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e19, 1e30])
def test_a_right_side_of_any_size_is_solved(size: float) -> None:
    system, right = signs_system(128, 48)
    expected = torch.linalg.solve(system.double(), right.double())
    found = conjugate_gradients(system, right * size, torch.zeros_like(right))
    assert found is not None
    assert torch.allclose(found.double() / size, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_a_right_side_that_is_infinite_has_no_solution() -> None:
    system, right = signs_system(128, 48)
    assert conjugate_gradients(system, right * torch.inf, torch.zeros_like(right)) is None


def test_scales_do_not_depend_on_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = pair_moments(torch.ones(40))
    target = torch.randn(64, 40, generator=torch.Generator().manual_seed(1))
    hessian = hessian_of(moments, signs=False)
    assert hessian is not None
    start = start_component(target, Axis.ROW_COL)
    stepped = fit_scales(start, target, hessian.matrix)
    monkeypatch.setattr(scales, "conjugate_gradients", lambda *_: None)
    factored = fit_scales(start, target, hessian.matrix)
    assert torch.equal(stepped.signs, factored.signs)
    assert torch.allclose(stepped.col, factored.col, rtol=1e-3)
    assert torch.allclose(stepped.row, factored.row, rtol=1e-3)


@pytest.mark.parametrize("largest", [1.0, 1e2, 1e5])
def test_the_correction_in_float32_agrees_with_float64_for_inputs_of_any_size(largest: float) -> None:
    sizes = torch.logspace(0.0, torch.log10(torch.tensor(largest)).item(), 24)
    moments = pair_moments(sizes)
    tuned = torch.randn(10, 24, generator=torch.Generator().manual_seed(2)) / sizes
    hessian = hessian_of(moments, signs=False)
    assert hessian is not None
    assert moments.E is not None
    exact = moments.G + torch.diag(hessian.matrix.diagonal().double() - moments.G.diagonal())
    expected = torch.linalg.solve(exact, (tuned.double() @ moments.E).t()).t()
    found = hessian.correction(tuned).double()
    assert torch.allclose(found * sizes, expected * sizes, rtol=0, atol=1e-4 * float((expected * sizes).abs().max()))
