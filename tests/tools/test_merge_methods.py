"""Fits into new masks and the methods of mergekit give the results of dense arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import peraxis_format as pxd
from peraxis_tools.deltas.factors import module_sum
from peraxis_tools.merge import Mixture, merge
from peraxis_tools.merge.fit import fit_masks
from peraxis_tools.merge.methods import Magnitudes, make_mixer, threshold
from tests.factories import random_storage, sign_module, write_delta
from tests.tools.merge_pairs import SHAPES, dense, pair_of_deltas


@given(st.integers(0, 2**32), st.integers(1, 4))
@settings(max_examples=15)
def test_the_reported_error_of_a_fit_is_its_error(seed, bits) -> None:
    rng = np.random.default_rng(seed)
    wanted = (rng.standard_normal((30, 20)) * rng.random((30, 1)) * rng.random(20)).astype(np.float32)
    fit = fit_masks(lambda index: lambda rows: wanted[rows].copy(), wanted.shape, bits)
    base = random_storage(rng, wanted.shape)
    like = sign_module(rng, "m", base)
    got = dense(replace(like, components=fit.components))
    assert fit.square_error == pytest.approx(np.sum((wanted - got) ** 2), rel=1e-4)
    assert fit.square_norm == pytest.approx(np.sum(wanted.astype(np.float64) ** 2))
    # No law says that a mask halves the error, but each leaves less than a mean magnitude per row would.
    rows = np.abs(wanted).mean(axis=1, keepdims=True)
    assert fit.square_error <= np.sum((wanted - np.sign(wanted) * rows) ** 2) * 1.01


def test_more_masks_leave_less(tmp_path: Path) -> None:
    _, a, b = pair_of_deltas(5, (64, 48), (pxd.Axis.ROW,), (pxd.Axis.COL,))
    paths = [write_delta(tmp_path / "a.pxd", [a]), write_delta(tmp_path / "b.pxd", [b])]
    errors = [merge(paths, tmp_path / f"{k}.pxd", weights=[0.7, 0.3], masks=k).error for k in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    with pxd.open(tmp_path / "2.pxd") as file:
        assert len(file.entry("m.weight").components) == 2
        got, wanted = dense(file.load("m.weight")), 0.7 * dense(a) + 0.3 * dense(b)
    assert errors[1] == pytest.approx(np.linalg.norm(got - wanted) / np.linalg.norm(wanted), rel=1e-3)


def test_experts_are_fitted_each_on_its_own(tmp_path: Path) -> None:
    _, a, b = pair_of_deltas(5, (3, 10, 12), (pxd.Axis.ROW,), (pxd.Axis.COL,))
    paths = [write_delta(tmp_path / "a.pxd", [a]), write_delta(tmp_path / "b.pxd", [b])]
    result = merge(paths, tmp_path / "out.pxd", weights=[1, 1], masks=2)
    with pxd.open(result.path) as file:
        got, wanted = dense(file.load("m.weight")), dense(a) + dense(b)
    assert result.error == pytest.approx(np.linalg.norm(got - wanted) / np.linalg.norm(wanted), rel=2e-3)


def ties(deltas: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    """Compute TIES as in its paper on whole arrays: trim, elect, disjoint merge."""
    trimmed = []
    for delta in deltas:
        threshold = np.sort(np.abs(delta).reshape(-1))[-int(density * delta.size)]
        trimmed.append(np.where(np.abs(delta) >= threshold, delta, 0))
    elected = np.sign(sum(w * d for w, d in zip(weights, trimmed, strict=True)))
    agree = [np.sign(w * d) == elected for w, d in zip(weights, trimmed, strict=True)]
    total = sum(w * d * a for w, d, a in zip(weights, trimmed, agree, strict=True))
    divisor = sum(w * (a & (d != 0)) for w, d, a in zip(weights, trimmed, agree, strict=True))
    return total / np.where(np.abs(divisor) > 1e-8, divisor, 1)


@given(st.integers(0, 2**32), st.sampled_from([0.2, 0.5, 0.9, 1.0]))
@settings(max_examples=20)
def test_the_ties_method_is_that_of_its_paper(seed, density) -> None:
    rng = np.random.default_rng(seed)
    deltas = [rng.standard_normal((40, 30)).astype(np.float32) for _ in range(3)]
    weights = [0.5, 0.3, 0.9]
    sizes = [Magnitudes(count=d.size, blocks=lambda d=d: iter((d[:7], d[7:]))) for d in deltas]
    mixer = make_mixer(Mixture(method="ties", density=density), weights, ["a", "b", "c"], sizes)
    np.testing.assert_allclose(mixer.mix(deltas, (0,)), ties(deltas, weights, density), rtol=1e-4, atol=1e-6)


@given(st.integers(0, 2**32), SHAPES, st.sampled_from(list(pxd.Axis)), st.floats(0, 1))
@settings(max_examples=60)
def test_a_threshold_from_scales_alone_is_that_of_the_dense_delta(seed, shape, axis, density) -> None:
    rng = np.random.default_rng(seed)
    module = sign_module(rng, "m", random_storage(rng, shape), axes=(axis,))
    sizes = np.sort(np.abs(dense(module)).reshape(-1))
    wanted = int(density * sizes.size)
    products = []
    for index in np.ndindex(shape[:-2]):
        (factors,) = module_sum(module, index).components
        products.append((factors.row.astype(np.float64), factors.col.astype(np.float64)))
    block = dense(module).astype(np.float32)
    found = {
        threshold(Magnitudes(count=sizes.size, blocks=lambda: iter([block]), products=each), density)
        for each in (None, products)
    }
    assert found == {sizes[-wanted] if wanted else np.inf}


@pytest.mark.parametrize("shape", [(70, 40), (9, 21), (3, 5, 8)])
@pytest.mark.parametrize("mixture", [Mixture(), *(Mixture(method=m, density=0.4) for m in ("linear", "ties", "dare"))])
def test_a_fit_is_the_same_bytes_without_numba(tmp_path: Path, monkeypatch, mixture, shape) -> None:
    _, a, b = pair_of_deltas(3, shape, (pxd.Axis.ROW_COL, pxd.Axis.ROW), (pxd.Axis.COL,))
    paths = [write_delta(tmp_path / "a.pxd", [a]), write_delta(tmp_path / "b.pxd", [b])]
    pytest.importorskip("numba")
    monkeypatch.setenv("PERAXIS_BACKEND", "numba")
    compiled = merge(paths, tmp_path / "1.pxd", weights=[0.7, -0.4], mixture=mixture, masks=2)
    monkeypatch.setenv("PERAXIS_BACKEND", "numpy")
    plain = merge(paths, tmp_path / "2.pxd", weights=[0.7, -0.4], mixture=mixture, masks=2)
    assert compiled.content_id == plain.content_id
    assert compiled.error == plain.error


def test_dare_keeps_the_mean_and_drops_its_share() -> None:
    delta = np.ones((200, 500), np.float32)
    mixture = Mixture(method="dare", density=0.3, seed=1)
    mixed = make_mixer(mixture, [1.0], ["a"], [Magnitudes(count=delta.size, blocks=lambda: iter([delta]))]).mix(
        [delta], (0,)
    )
    assert set(np.unique(mixed)) == {np.float32(0.0), np.float32(1.0) / np.float32(0.3)}
    assert np.mean(mixed != 0) == pytest.approx(0.3, abs=0.01)
    assert mixed.mean() == pytest.approx(1.0, abs=0.03)
