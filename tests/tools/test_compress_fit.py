"""The mathematics of one module agrees with a direct computation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peraxis_format as pxd
from peraxis_format import Axis
from peraxis_tools.compress.fit.choice import fit_matrices
from peraxis_tools.compress.fit.fit import (
    FitOptions,
    FittedMatrix,
    Matrix,
    Quadratic,
    dense,
    fit_components,
    hessian_of,
    quadratic,
)
from peraxis_tools.compress.fit.mean import mean_components
from peraxis_tools.compress.fit.moments.sums import Moments, Statistics, Validation, grid_of
from peraxis_tools.compress.fit.scales import fit_scales, start_component
from peraxis_tools.compress.fit.signs import Magnitude, coordinate_descent, gptq_signs, inverse_factor
from peraxis_tools.compress.model.components import apply_components, components_of
from peraxis_tools.ops.delta_sums import delta_sums
from tests.factories import dense_component

AXES = (Axis.ROW, Axis.COL, Axis.ROW_COL, Axis.TENSOR)


def problem(
    d_out: int = 12, d_in: int = 20, tokens: int = 200, seed: int = 0, noise: float = 0.05
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (base, fine-tuned, student inputs, teacher inputs). The inputs are correlated."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(d_out, d_in, generator=g)
    tuned = base + 0.1 * torch.randn(d_out, d_in, generator=g) * torch.rand(d_out, 1, generator=g)
    x = torch.randn(tokens, d_in, generator=g) @ torch.randn(d_in, d_in, generator=g)
    return base, tuned, x, x + noise * torch.randn(tokens, d_in, generator=g)


def moments_of(x: torch.Tensor, teacher: torch.Tensor | None, batches: int = 3) -> Moments:
    moments = Moments.zeros(x.shape[1], paired=teacher is not None, validates=True, device=x.device)
    for rows in torch.arange(len(x)).chunk(batches):
        moments.add(x[rows], None if teacher is None else teacher[rows])
    return moments


def error_of(residual: torch.Tensor, tuned: torch.Tensor, moments: Moments) -> float:
    """Return the sum of squares of the output error."""
    return Validation(tuned, moments).error(residual) * moments.tokens


def problem_of(tuned: torch.Tensor, base: torch.Tensor, moments: Moments) -> Quadratic:
    hessian = hessian_of(moments, signs=True)
    assert hessian is not None
    return quadratic(tuned - base + hessian.correction(tuned), hessian)


def fit_one(
    base: torch.Tensor, tuned: torch.Tensor, statistics: Statistics, *, dtype: torch.dtype = torch.float32, **how: Any
) -> FittedMatrix:
    """Fit one matrix. how: axes and components of the Matrix, and FitOptions."""
    own = {name: how.pop(name) for name in ("axes", "components") if name in how}
    matrix = Matrix(base=base, fine_tuned=tuned, dtype=dtype, **own)
    return fit_matrices([matrix], statistics=statistics, options=FitOptions(**how))[0]


def statistics_of(x: torch.Tensor, teacher: torch.Tensor) -> Statistics:
    cut = len(x) * 3 // 4
    return Statistics(fit=moments_of(x[:cut], teacher[:cut]), validation=moments_of(x[cut:], teacher[cut:]))


def test_the_error_from_sums_is_the_error_of_the_outputs() -> None:
    base, tuned, x, teacher = problem()
    stored = 0.07 * torch.sign(tuned - base)
    outputs = teacher @ tuned.T - x @ (base + stored).T
    error = error_of(tuned - base - stored, tuned, moments_of(x, teacher))
    assert error == pytest.approx(float(outputs.square().sum()), rel=1e-4)


@given(order=st.permutations(range(6)), split=st.integers(0, 6))
def test_sums_on_a_grid_do_not_depend_on_the_order_nor_on_who_adds_them(order: list[int], split: int) -> None:
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(40, 9, generator=g) * 20.0**i for i in range(6)]
    seen = float(batches[0].square().sum(dim=0).max())

    def total(numbers: Sequence[int], grid: float) -> Moments:
        moments = Moments.zeros(9, paired=True, validates=True, grid=grid)
        for i in numbers:
            moments.add(batches[i], 1.01 * batches[i])
        return moments

    grid = grid_of(20.0**10 * seen, len(batches))
    whole, parts = total(range(6), grid), total(order[:split], grid)
    parts.merge(total(order[split:], grid))
    for exact, one, other in zip(total(range(6), 0.0).tensors(), whole.tensors(), parts.tensors(), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, exact, rtol=1e-7, atol=6 * grid)


@pytest.mark.parametrize("axis", AXES)
def test_closed_forms_are_the_least_squares_solution(axis: Axis) -> None:
    base, tuned, x, teacher = problem()
    target = problem_of(tuned, base, moments_of(x, teacher))
    start = start_component(tuned - base, axis)
    fitted = fit_scales(start, target.target, target.hessian.matrix)

    def cost(row: torch.Tensor, col: torch.Tensor) -> float:
        rest = (target.target - torch.where(fitted.signs, col, -col) * row[:, None]).double()
        return float(torch.sum((rest @ target.hessian.matrix.double()) * rest))

    best = cost(fitted.row, fitted.col)
    assert best < cost(start.row, start.col)
    # No small change of any scale lowers the cost by more than the ridge allows.
    slack = 1e-4 * best if axis in (Axis.COL, Axis.ROW_COL) else 1e-6 * best
    for factor in (0.97, 1.03):
        if axis is not Axis.COL:
            for o in range(len(fitted.row)) if axis is not Axis.TENSOR else [slice(None)]:
                row = fitted.row.clone()
                row[o] *= factor
                assert cost(row, fitted.col) >= best - slack
        if axis in (Axis.COL, Axis.ROW_COL):
            for j in range(len(fitted.col)):
                col = fitted.col.clone()
                col[j] *= factor
                assert cost(fitted.row, col) >= best - slack


@given(seed=st.integers(0, 1000), components=st.integers(1, 3))
def test_descent_never_raises_the_error_and_feedback_beats_plain_signs(seed: int, components: int) -> None:
    g = torch.Generator().manual_seed(seed)
    d_out, d_in = 9, 150  # more than a block of columns
    x = torch.randn(300, d_in, generator=g) @ torch.randn(d_in, d_in, generator=g)
    hessian = (x.T @ x).double()
    hessian.diagonal().add_(0.05 * hessian.diagonal().mean())
    target = torch.randn(d_out, d_in, generator=g)
    sizes = [
        Magnitude(0.5**k * (0.5 + torch.rand(d_out, generator=g)), 0.5 + torch.rand(d_in, generator=g))
        for k in range(components)
    ]

    def cost(signs: list[torch.Tensor]) -> float:
        rest = target - sum(torch.where(s, m.col, -m.col) * m.row[:, None] for s, m in zip(signs, sizes, strict=True))
        return float(torch.sum((rest.double() @ hessian) * rest.double()))

    plain = [target >= 0] * components
    fed = gptq_signs(target, sizes, inverse_factor(hessian))
    one = coordinate_descent(target, sizes, fed, hessian.float(), sweeps=1)
    two = coordinate_descent(target, sizes, one, hessian.float(), sweeps=3)
    assert cost(fed) < cost(plain)
    assert cost(two) <= cost(one) * (1 + 1e-6)
    assert cost(one) <= cost(fed) * (1 + 1e-6)


@pytest.mark.parametrize("compiler", ["numba", "triton"])
@pytest.mark.parametrize("components", [1, 2])
def test_compiled_and_plain_sign_steps_agree(compiler: str, components: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(compiler)
    device = "cuda" if compiler == "triton" and torch.cuda.is_available() else "cpu"
    base, tuned, x, teacher = (tensor.to(device) for tensor in problem(d_out=18, d_in=132, tokens=400))
    found = problem_of(tuned, base, moments_of(x, teacher))
    results = []
    for backend in (compiler, "torch"):
        monkeypatch.setenv("PERAXIS_BACKEND", backend)
        terms = fit_components(found, Axis.ROW_COL, FitOptions(rounds=1, sweeps=2), components=components)
        results.append(dense(terms, base))
    assert (torch.sign(results[0]) != torch.sign(results[1])).float().mean() < 1e-3
    torch.testing.assert_close(results[0], results[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("tokens", [2, 8, 15, 60])
def test_few_tokens_never_make_it_worse_than_no_text_at_all(tokens: int, refine: bool) -> None:
    base, tuned, x, teacher = problem(tokens=tokens + 2000, noise=0.3)
    fitted = fit_one(base, tuned, statistics_of(x[:tokens], teacher[:tokens]), refine=refine)
    assert fitted.error <= min(fitted.error_none, fitted.error_same)
    # The following is measured on two thousand tokens that are not in the fit.
    unseen = moments_of(x[tokens:], teacher[tokens:])
    nothing = Statistics(fit=moments_of(x[:0], teacher[:0]), validation=moments_of(x[:0], teacher[:0]))
    plain = fit_one(base, tuned, nothing, refine=refine)
    ours = error_of(tuned - base - dense(fitted.components, base), tuned, unseen)
    none = error_of(tuned - base - dense(plain.components, base), tuned, unseen)
    assert ours <= 1.02 * none


def test_more_masks_and_refined_signs_lower_the_held_out_error() -> None:
    base, tuned, x, teacher = problem(tokens=4000, noise=0.0)
    unseen = moments_of(x[2000:], teacher[2000:])

    def error(**changes: object) -> float:
        fitted = fit_one(base, tuned, statistics_of(x[:2000], teacher[:2000]), **changes)
        found = error_of(tuned - base - dense(fitted.components, base), tuned, unseen)
        # The reported error is of validation tokens, before the last rounds, so it is not below the true error.
        assert found / 2000 <= 1.1 * fitted.error
        return found

    closed, refined = error(refine=False), error()
    assert refined < 0.7 * closed
    assert error(components=2) < 0.5 * refined
    assert error(components=4) < 0.2 * error(components=2)


def test_a_delta_below_the_grid_of_the_dtype_is_left_out_rather_than_made_noise() -> None:
    base, _, x, _ = problem()
    base = base.bfloat16().float()
    tuned = base.clone()
    tuned[0, 0] = tuned[0, 0].bfloat16() + torch.finfo(torch.bfloat16).eps * tuned[0, 0].abs()
    tuned = tuned.bfloat16().float()
    fitted = fit_one(base, tuned, statistics_of(x, x), dtype=torch.bfloat16)
    assert fitted.error <= fitted.error_same


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("transposed", [False, True])
def test_stored_components_rebuild_the_fitted_matrix(axis: Axis, transposed: bool) -> None:
    base, tuned, x, teacher = problem()
    fitted = fit_one(base, tuned, statistics_of(x, teacher), axes=(axis,), components=2)
    components = components_of([fitted.components], batch=(), transposed=transposed)
    stored = base.T.contiguous() if transposed else base
    rebuilt = apply_components(stored, components, torch.float32)
    expected = base + dense(fitted.components, base)
    torch.testing.assert_close(rebuilt.T if transposed else rebuilt, expected, rtol=0, atol=1e-6)
    module = pxd.ModuleDelta(
        name="w",
        shape=tuple(stored.shape),
        dtype=pxd.DType.F32,
        encoding=pxd.Encoding.SIGN,
        base=pxd.BaseRef(dtype=pxd.DType.F32, shape=tuple(stored.shape), sha256="0" * 64),
        components=components,
    )
    # The student runs with exactly the weights that a reader of the file computes.
    assert np.array_equal(pxd.reconstruct(module, stored.numpy()), rebuilt.numpy())


@pytest.mark.parametrize("dtype", [pxd.DType.BF16, pxd.DType.F16, pxd.DType.F32])
@given(shape=st.tuples(st.integers(1, 150), st.integers(1, 70)), seed=st.integers(0, 99))
def test_sums_are_the_same_bits_with_and_without_numba(dtype: pxd.DType, shape: tuple[int, int], seed: int) -> None:
    pytest.importorskip("numba")
    rng = np.random.default_rng(seed)
    base = pxd.from_float32(rng.standard_normal(shape, np.float32), dtype)
    tuned = pxd.from_float32(pxd.to_float32(base, dtype) + rng.standard_normal(shape, np.float32) / 50, dtype)
    weights = rng.random(shape[1])
    one, two = (
        delta_sums(base, tuned, base_dtype=dtype, dtype=dtype, weights=weights, backend=backend)
        for backend in ("numba", "numpy")
    )
    assert np.array_equal(one.mask, two.mask)
    assert one.row.tobytes() == two.row.tobytes()
    assert one.col.tobytes() == two.col.tobytes()
    assert one.square == two.square
    delta = np.abs((pxd.to_float32(tuned, dtype) - pxd.to_float32(base, dtype)).astype(np.float64))
    np.testing.assert_allclose(one.row, delta @ weights, rtol=1e-12)
    np.testing.assert_allclose(one.col, delta.sum(axis=0), rtol=1e-12)


@pytest.mark.parametrize("shape", [(9, 21), (3, 9, 21)])
def test_mean_magnitudes_take_the_axis_of_least_weight_error_and_each_mask_lowers_it(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(shape, np.float32)
    tuned = base + rng.standard_normal(shape, np.float32) * rng.random((*shape[:-1], 1), np.float32)
    dtypes = {"base_dtype": pxd.DType.F32, "dtype": pxd.DType.F32}

    def error(axis: Axis | None, count: int = 1) -> float:
        components = mean_components(base, tuned, axis=axis, components=count, **dtypes)
        return float(np.square(tuned - base - sum(dense_component(c, shape) for c in components)).sum())

    assert error(None) == pytest.approx(min(error(axis) for axis in AXES), rel=1e-3)
    errors = [error(None, count) for count in range(1, 6)]
    assert all(later < 0.8 * earlier for earlier, later in itertools.pairwise(errors))
    assert mean_components(base, base, axis=None, components=2, **dtypes) == ()


@pytest.mark.parametrize("share", [0.02, 0.2, 0.6])
def test_mostly_unchanged_weights_are_never_worse_than_the_base_or_one_scalar(share: float) -> None:
    base, tuned, x, _ = problem(d_out=16, d_in=48, tokens=4000)
    g = torch.Generator().manual_seed(1)
    # A few units in the last place of BF16 in a share of the weights, as in a fine-tune at a low learning rate.
    base = base.bfloat16().float()
    moved = torch.rand(base.shape, generator=g) < share
    tuned = torch.where(moved, base * (1 + 2**-7 * torch.randn(base.shape, generator=g)), base).bfloat16().float()
    statistics = statistics_of(x[:2000], x[:2000])
    unseen = moments_of(x[2000:], x[2000:])

    def error(fitted: torch.Tensor) -> float:
        applied = (base + fitted).bfloat16().float()
        return error_of(tuned - applied, tuned, unseen)

    fitted = fit_one(base, tuned, statistics, dtype=torch.bfloat16)
    delta = tuned - base
    scalar = torch.where(delta >= 0, 1.0, -1.0) * delta.abs().mean()
    ours = error(dense(fitted.components, base))
    assert ours <= 1.02 * error(torch.zeros_like(base))
    assert ours <= error(scalar)
    assert not fitted.components or ours < 0.9 * error(torch.zeros_like(base))


def low_rank_delta(rng: np.random.Generator, shape: tuple[int, ...], directions: int) -> np.ndarray:
    """Return a delta of a few directions with noise, like that of a fine-tune in BF16."""
    left = rng.standard_normal((*shape[:-1], directions))
    right = rng.standard_normal((*shape[:-2], directions, shape[-1]))
    return (left @ right + 1.5 * rng.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(96, 64), (2, 96, 64)])
def test_scales_for_outputs_lower_the_error_along_the_directions_of_the_delta(
    shape: tuple[int, ...], axis: Axis
) -> None:
    rng = np.random.default_rng(0)
    delta = low_rank_delta(rng, shape, 2)
    base = np.zeros(shape, np.float32)
    dtypes = {"base_dtype": pxd.DType.F32, "dtype": pxd.DType.F32}

    def error(*, for_outputs: bool) -> float:
        (component,) = mean_components(base, delta, axis=axis, components=1, for_outputs=for_outputs, **dtypes)
        rest = delta - dense_component(component, shape)
        return float(np.square(rest @ np.swapaxes(delta, -1, -2)).sum())

    assert error(for_outputs=True) < 0.8 * error(for_outputs=False)


def test_scales_for_outputs_of_noise_stay_mean_magnitudes() -> None:
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((64, 4096)).astype(np.float32)
    base = np.zeros_like(delta)
    plain, scaled = (
        mean_components(
            base, delta, base_dtype=pxd.DType.F32, dtype=pxd.DType.F32, axis=Axis.ROW, components=1, for_outputs=given
        )[0]
        for given in (False, True)
    )
    ratio = np.ldexp(scaled.row.astype(float), scaled.exponent) / np.ldexp(plain.row.astype(float), plain.exponent)
    assert 0.9 < ratio.min() < ratio.max() < 1.8
