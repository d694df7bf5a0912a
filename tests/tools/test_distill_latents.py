"""The latents of trained signs: their bytes, their steps, and the mask that they write."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from peraxis_format import pack_signs, unpack_signs
from peraxis_tools.compress.distill.latents import SignLatents
from peraxis_tools.compress.shared_sizes import BYTES_A_SIGN

SHAPE = (2, 24, 21)
RATE = 0.05


def made(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> tuple[SignLatents, Tensor]:
    """Latents, and the mask that they write."""
    signs = np.random.default_rng(seed).random(shape) < 0.5
    mask = torch.from_numpy(pack_signs(signs))
    return SignLatents(mask, shape[-1]), mask


def gradients(steps: int, seed: int = 1) -> Tensor:
    """float32 [steps, *SHAPE]: a drift and noise, of other size in each row and column."""
    draw = torch.Generator().manual_seed(seed)
    scales = torch.rand(SHAPE[:2], generator=draw).exp()[..., None] * torch.rand(SHAPE[2], generator=draw).exp()
    drift = torch.randn(SHAPE, generator=draw)
    return 1e-6 * scales * (drift + torch.randn(steps, *SHAPE, generator=draw))


def stepped(latents: SignLatents, each: Tensor, parts: int = 1) -> None:
    """Take one step for each gradient, added in so many equal parts."""
    for gradient in each:
        for _ in range(parts):
            for e, matrix in enumerate(gradient):
                latents.add(e, slice(0, SHAPE[1]), matrix / parts)
        latents.step(RATE)


def test_a_trained_sign_takes_four_bytes() -> None:
    latents, mask = made(shape=(1, 512, 1024))
    stepped_bytes = sum(array.nbytes for array in latents.arrays().values()) - mask.numel()
    assert BYTES_A_SIGN == 4
    assert 4.0 <= stepped_bytes / (512 * 1024) < 4.1


def test_latents_start_on_the_side_of_their_sign_and_rest_there() -> None:
    latents, mask = made()
    signs = unpack_signs(mask.numpy(), SHAPE[-1])
    assert np.array_equal(latents.values().numpy(), np.where(signs, 0.5, -0.5))
    before = mask.clone()
    latents.step(RATE)
    assert torch.equal(mask, before)


def test_the_mask_holds_the_signs_of_the_latents_after_each_step() -> None:
    latents, mask = made()
    before = mask.clone()
    for gradient in gradients(20):
        stepped(latents, gradient[None])
        assert np.array_equal(mask.numpy(), pack_signs(latents.values().numpy() >= 0))
    assert not torch.equal(mask, before)


def test_latents_move_as_with_adam_where_squares_are_of_rank_one() -> None:
    steps = 12
    draw = torch.Generator().manual_seed(3)
    row, col = (torch.rand(n, generator=draw) + 0.5 for n in SHAPE[1:])
    signs = torch.where(torch.rand(steps, *SHAPE, generator=draw) < 0.3, -1.0, 1.0)
    each = 1e-4 * signs * row[:, None] * col
    latents, _ = made()
    free = torch.nn.Parameter(latents.values().clone())
    adam = torch.optim.Adam([free], lr=RATE, eps=1e-12)
    for gradient in each:
        free.grad = gradient.clone()
        adam.step()
    stepped(latents, each)
    assert (free - latents.values()).abs().max() < 0.02 * (free - made()[0].values()).abs().max()


def test_steps_do_not_depend_on_the_size_of_the_gradient() -> None:
    one, small = made()[0], made()[0]
    stepped(one, gradients(10))
    stepped(small, gradients(10) * 2.0**-30)
    assert torch.equal(one.values(), small.values())


def test_opposite_gradients_move_opposite_latents_oppositely() -> None:
    latents, _ = made()
    state = latents.arrays()
    opposite, _ = made()
    opposite.restore({**state, "value": -state["value"], "mask": ~state["mask"]})
    stepped(latents, gradients(10))
    stepped(opposite, -gradients(10))
    assert torch.equal(opposite.values(), -latents.values())


def test_a_small_drift_moves_a_latent_as_far_near_zero_as_far_from_it() -> None:
    latents, _ = made(shape=(1, 8, 8))
    state = latents.arrays()
    state["value"] = np.linspace(-20000, 20000, 64).astype(np.int16).reshape(1, 8, 8)
    latents.restore({**state, "mask": pack_signs(state["value"] >= 0)})
    before = latents.values()
    for _ in range(100):
        latents.add(0, slice(0, 8), torch.full((8, 8), 1e-3))
        latents.step(1e-3)
    moved = before - latents.values()
    assert moved.min() == moved.max() == pytest.approx(0.1, rel=0.05)


def test_a_latent_beyond_the_clip_stays() -> None:
    latents, _ = made(shape=(1, 1, 2))
    state = latents.arrays()
    latents.restore({**state, "value": np.array([[[-24577, -24575]]], np.int16), "mask": np.zeros((1, 1, 1), np.uint8)})
    for _ in range(5):
        latents.add(0, slice(0, 1), torch.full((1, 2), 1.0))
        latents.step(RATE)
    far, near = latents.arrays()["value"][0, 0].tolist()
    assert far == -24577
    assert near < -24577


def test_rows_without_a_gradient_do_not_move() -> None:
    latents, mask = made()
    before, signs = latents.values(), mask.clone()
    for gradient in gradients(5):
        latents.add(0, slice(3, 4), gradient[0, 3:4])
        latents.step(RATE)
    moved = (latents.values() != before).any(-1)
    assert moved[0, 3]
    assert moved.sum() == 1
    assert torch.equal(mask[1], signs[1])


@pytest.mark.parametrize("cut", [1, 5])
def test_a_restored_state_goes_on_to_the_same_bits(cut: int) -> None:
    whole, expected = made()
    stepped(whole, gradients(10))
    first, _ = made()
    stepped(first, gradients(10)[:cut])
    again, mask = made(seed=7)
    again.restore({name: array.copy() for name, array in first.arrays().items()})
    stepped(again, gradients(10)[cut:])
    assert torch.equal(mask, expected)
    assert all(np.array_equal(a, b) for a, b in zip(again.arrays().values(), whole.arrays().values(), strict=True))


def test_at_rest_only_the_signs_are_kept() -> None:
    latents, mask = made()
    stepped(latents, gradients(5))
    latents.rest()
    kept = mask.clone()
    stepped(latents, gradients(5))
    assert latents.at_rest
    assert torch.equal(mask, kept)
    assert list(latents.arrays()) == ["mask"]
    again, other = made(seed=7)
    again.restore(latents.arrays())
    assert again.at_rest
    assert torch.equal(other, kept)
