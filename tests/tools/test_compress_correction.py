"""The correction for the blocks before a module is taken as far as it holds on another text."""

from __future__ import annotations

import pytest
import torch

from peraxis_tools.compress.fit.choice import fit_matrices
from peraxis_tools.compress.fit.fit import FitOptions, Matrix, dense, hessian_of
from peraxis_tools.compress.fit.moments.sums import Moments, Statistics, Validation

D_OUT, D_IN, TOKENS = 24, 64, 160


def matrix() -> Matrix:
    g = torch.Generator().manual_seed(3)
    base = torch.randn(D_OUT, D_IN, generator=g)
    return Matrix(
        base=base, fine_tuned=base + 0.02 * torch.randn(D_OUT, D_IN, generator=g), dtype=torch.float32, components=3
    )


def moments(seed: int, *, noise: float, gain: float) -> Moments:
    """Correlated inputs, which the teacher sees `gain` times larger, and with noise of its own."""
    mixed = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(7)) / D_IN**0.5
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, D_IN, generator=g) @ mixed @ mixed
    found = Moments.zeros(D_IN, paired=True, validates=True)
    found.add(x, gain * x + noise * torch.randn(TOKENS, D_IN, generator=g))
    return found


@pytest.mark.parametrize(("noise", "gain"), [(0.05, 1.0), (0.05, 1.02), (0.0, 1.05), (0.01, 0.9)])
def test_the_share_is_that_of_least_error(noise: float, gain: float) -> None:
    its = matrix()
    hessian = hessian_of(moments(1, noise=noise, gain=gain), signs=False)
    assert hessian is not None
    correction = hessian.correction(its.fine_tuned)
    validation = Validation(its.fine_tuned, moments(2, noise=noise, gain=gain))
    share = validation.share(correction)
    errors = [validation.error(-s * correction) for s in torch.linspace(0, 1, 101).tolist()]
    assert validation.error(-share * correction) <= min(errors) * (1 + 1e-5)


def test_noise_gets_a_small_share_and_a_difference_that_is_there_a_large_one() -> None:
    its = matrix()
    for noise, gain, low, high in ((0.05, 1.0, 0.0, 0.2), (0.001, 1.05, 0.9, 1.0)):
        hessian = hessian_of(moments(1, noise=noise, gain=gain), signs=False)
        assert hessian is not None
        share = Validation(its.fine_tuned, moments(2, noise=noise, gain=gain)).share(hessian.correction(its.fine_tuned))
        assert low <= share <= high


def test_a_fit_beside_noise_alone_is_as_near_as_one_without_a_teacher() -> None:
    """A correction in full would fit the noise of the few tokens, and be worse than no calibration."""
    its = matrix()
    unseen = Validation(its.fine_tuned, moments(9, noise=0.0, gain=1.0))

    def error(noise: float) -> float:
        statistics = Statistics(
            fit=moments(1, noise=noise, gain=1.0), validation=moments(2, noise=noise, gain=1.0), crossed=True
        )
        found = fit_matrices([its], statistics=statistics, options=FitOptions())[0]
        return unseen.error(its.fine_tuned - its.base - dense(found.components, its.base))

    assert error(0.01) <= 1.05 * error(0.0)
