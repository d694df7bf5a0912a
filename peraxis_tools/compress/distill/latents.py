"""Latents of trained signs, with their optimizer: four bytes a sign instead of the sixteen of AdamW in float32.

    B = sign(z)          z: one latent for each sign, in units of the scale
    z <- z - rate m / sqrt(v)

z     int16, in steps of 2^-13 up to 4. Latents beyond _CLIP get no gradient, so a fixed point is enough. Its steps are
      equal, so a small update is not lost because the latent is large
m     bfloat16, the mean of the gradients (beta 0.9). A batch's gradients are added to it one by one, as the backward
      pass finds them, so no gradient of a whole matrix is kept
v     the mean of the squared gradients (beta 0.999), float32, as the product of its row and column means (Adafactor,
      arXiv 1804.04235). The squares are those of the gradients that are added: of one sample each on a CPU

The signs of a step are in the packed mask, which is rewritten after it. When signs are no longer trained, only the mask
is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peraxis_format import Array

__all__ = ["SignLatents", "row_blocks"]

_UNIT = 1 << 13
_MOST = (1 << 15) - 1
_START = 0.5  # from zero, in scales: a gradient can flip a sign but noise cannot
_CLIP = 3.0  # a latent further than this many scales from zero gets no gradient
_BETAS = (0.9, 0.999)
_TINY = 1e-37
_BLOCK = 1 << 18  # values at a time: they stay in a processor's cache


def row_blocks(d_out: int, d_in: int) -> Iterator[slice]:
    """Blocks of rows of _BLOCK values."""
    step = -(-_BLOCK // d_in)
    return (slice(first, min(first + step, d_out)) for first in range(0, d_out, step))


@dataclass(slots=True)
class _Moments:
    """The latents and the moments of their gradients. row, col: means of squares; new_row, new_col: of this step."""

    value: Tensor
    mean: Tensor
    row: Tensor
    col: Tensor
    new_row: Tensor
    new_col: Tensor
    steps: int = 0


class SignLatents:
    """The latents of one component. mask: uint8 [batch, d_out, ceil(d_in / 8)], whose bits `step` rewrites."""

    def __init__(self, mask: Tensor, d_in: int) -> None:
        batch, d_out, _ = mask.shape
        self._mask, self._shape = mask, (batch, d_out, d_in)
        row, col = (torch.zeros(batch, n, dtype=torch.float32, device=mask.device) for n in (d_out, d_in))
        self._moments: _Moments | None = _Moments(
            value=torch.empty(self._shape, dtype=torch.int16, device=mask.device),
            mean=torch.zeros(self._shape, dtype=torch.bfloat16, device=mask.device),
            row=row,
            col=col,
            new_row=row.clone(),
            new_col=col.clone(),
        )
        for e, rows in self._blocks():
            bits = _unpack(mask[e, rows], d_in).to(torch.int16)
            self._moments.value[e, rows] = bits.mul_(2).sub_(1).mul_(int(_START * _UNIT))

    def _blocks(self) -> Iterator[tuple[int, slice]]:
        batch, d_out, d_in = self._shape
        return ((e, rows) for e in range(batch) for rows in row_blocks(d_out, d_in))

    @property
    def at_rest(self) -> bool:
        """Whether the signs are no longer trained."""
        return self._moments is None

    def values(self) -> Tensor:
        """The latents in scales, float32 [batch, d_out, d_in]."""
        assert self._moments is not None
        return self._moments.value.float() / _UNIT

    @torch.no_grad()
    def add(self, e: int, rows: slice, gradient: Tensor) -> None:
        """Add the gradient [rows, d_in] of some rows of matrix e, float32; it is overwritten."""
        its = self._moments
        if its is None:
            return
        gradient.mul_(its.value[e, rows].abs() <= int(_CLIP * _UNIT))
        its.mean[e, rows].add_(gradient, alpha=1 - _BETAS[0])
        squares = gradient.square_()
        its.new_row[e, rows] += squares.mean(1)
        its.new_col[e] += squares.sum(0).div_(self._shape[1])

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Take one step with the gradients that were added. rate: scales."""
        its = self._moments
        if its is None:
            return
        its.steps += 1
        first, second = (1 - beta**its.steps for beta in _BETAS)
        for mean, new in ((its.row, its.new_row), (its.col, its.new_col)):
            mean.mul_(_BETAS[1]).add_(new, alpha=1 - _BETAS[1])
            new.zero_()
        whole = its.row.mean(1, keepdim=True)
        row = (its.row / second).clamp_(min=_TINY).rsqrt_().mul_(rate * _UNIT / first)
        col = (its.col / whole.clamp(min=_TINY)).clamp_(min=_TINY).rsqrt_()
        for e, rows in self._blocks():
            update = its.mean[e, rows].float().mul_(row[e, rows].unsqueeze(-1)).mul_(col[e])
            moved = its.value[e, rows].float().sub_(update.round_()).clamp_(-_MOST, _MOST)
            its.value[e, rows] = moved.to(torch.int16)
            self._mask[e, rows] = _pack(moved >= 0)
            its.mean[e, rows] *= _BETAS[0]

    def rest(self) -> None:
        """Keep the signs as they are, without latents."""
        self._moments = None

    def arrays(self) -> dict[str, Array]:
        """The state between two steps."""
        found = {"mask": self._mask.cpu().numpy()}
        if (its := self._moments) is not None:
            found |= {
                "value": its.value.cpu().numpy(),
                "mean": its.mean.view(torch.int16).cpu().numpy(),
                "row": its.row.cpu().numpy(),
                "col": its.col.cpu().numpy(),
                "steps": np.array(its.steps),
            }
        return found

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Restore the state that `arrays` gave."""
        self._mask.copy_(torch.from_numpy(arrays["mask"]))
        if "value" not in arrays:
            self.rest()
        elif (its := self._moments) is not None:
            its.value.copy_(torch.from_numpy(arrays["value"]))
            its.mean.view(torch.int16).copy_(torch.from_numpy(arrays["mean"]))
            its.row.copy_(torch.from_numpy(arrays["row"]))
            its.col.copy_(torch.from_numpy(arrays["col"]))
            its.steps = int(arrays["steps"])


def _unpack(mask: Tensor, d_in: int) -> Tensor:
    """uint8 [rows, d_in], 0 or 1, of packed bits [rows, ceil(d_in / 8)]."""
    lanes = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask.unsqueeze(-1) >> lanes) & 1).flatten(-2)[:, :d_in]


def _pack(bits: Tensor) -> Tensor:
    """The inverse of `_unpack`; bits: bool [rows, d_in]. Unused bits are zero (SPEC 5.3)."""
    rows, d_in = bits.shape
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -d_in % 8)).view(rows, -1, 8)
    packed = padded[..., 0].clone()
    for lane in range(1, 8):
        packed |= padded[..., lane] << lane
    return packed
