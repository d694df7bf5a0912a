"""Delta-CoMe (arXiv 2406.08903): W = W_b + L R, from the delta's singular vectors, the larger ones with more bits.

    W_f - W_b = U S V^T                                     L = U sqrt(S)  [d_out, r],   R = sqrt(S) V^T  [r, d_in]
    bits of a pair of singular vectors: 8 for the first 2, 3 for the next 32, 2 for the rest that the budget pays
    R^ = GPTQ(R, X),    L^ = GPTQ(L, R^ X)                  X: inputs of the layer in the fine-tune, [d_in, tokens]

GPTQ (arXiv 2210.17323) rounds one column after the other and lets the later ones take up the error, with the inverse
of the Hessian H = X X^T, to which 1% of its mean diagonal is added. A value of b bits is (q - (2^b - 1) / 2) step, with
an F16 step for each 128 values of a vector: that of the least squared error among multiples of the largest value. So

    bits of a module = sum over its pairs of vectors of  b (d_out + d_in) + 16 (ceil(d_out / 128) + ceil(d_in / 128))

and S costs nothing beyond the steps. The budget of a module is that of one mask, one bit a weight, as in the paper. The
method has no training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from baselines.lora import truncated
from baselines.pair import Pair

__all__ = ["BANDS", "GROUP", "MixedPrecision", "bit_widths", "delta_come", "gptq", "mixed_precision", "stored_bytes"]

BANDS = ((8, 2), (3, 32), (2, 1 << 30))  # (bits, at most so many pairs of vectors), in the order of singular values
GROUP = 128
_DAMPING = 0.01
_SHARES = torch.linspace(0.3, 1.0, 15)  # the outermost level as a share of the largest value of a group


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPrecision:
    """One module. left: float32 [d_out, r]; right: float32 [r, d_in], both as rounded. bytes: what they take."""

    left: Tensor
    right: Tensor
    bytes: int


def _pair_bits(shape: tuple[int, int], bits: int) -> int:
    return sum(bits * size + 16 * -(-size // GROUP) for size in shape)


def bit_widths(shape: tuple[int, int], budget: int) -> list[int]:
    """The bits of each pair of singular vectors that `budget` bytes pay for, the largest singular value first."""
    left, widths = 8 * budget, list[int]()
    for bits, most in BANDS:
        cost = _pair_bits(shape, bits)
        count = min(most, left // cost, min(shape) - len(widths))
        widths += [bits] * count
        left -= count * cost
    return widths


def stored_bytes(shape: tuple[int, int], widths: Sequence[int]) -> int:
    """The bytes of the codes and steps of a module, d_out x d_in."""
    return -(-sum(_pair_bits(shape, bits) for bits in widths) // 8)


@torch.no_grad()
def mixed_precision(delta: Tensor, hessian: Tensor, budget: int) -> MixedPrecision:
    """Compress a delta, float32 [d_out, d_in], to at most `budget` bytes. hessian: float32 [d_in, d_in]."""
    rows, columns = delta.shape
    widths = bit_widths((rows, columns), budget)
    left, right = truncated(delta, len(widths))
    if widths:
        bits = torch.tensor(widths, device=delta.device)
        right = gptq(right, bits[:, None], hessian, tall=1)
        left = gptq(left, bits[None], right @ hessian @ right.T, tall=GROUP)
    return MixedPrecision(left=left, right=right, bytes=stored_bytes((rows, columns), widths))


def gptq(weight: Tensor, bits: Tensor, hessian: Tensor, *, tall: int) -> Tensor:
    """Round a matrix, float32 [n, d], so that the error weighed by the Hessian, float32 [d, d], is small.

    bits: int64, broadcast to [n, d]. A step serves GROUP values: `tall` rows of GROUP / tall columns.
    """
    count, wide = weight.shape[1], GROUP // tall
    top = ((2.0**bits - 1) / 2).expand(weight.shape)
    factor = _inverse_factor(hessian)
    weight, rounded = weight.clone(), torch.empty_like(weight)
    for begin in range(0, count, GROUP):
        end = min(begin + GROUP, count)
        part, errors = weight[:, begin:end], torch.empty_like(weight[:, begin:end])
        for j in range(end - begin):
            level = top[:, begin + j]
            if j % wide == 0:
                step = _steps(part[:, j : j + wide], level, tall)
            row = factor[begin + j, begin + j : end]
            rounded[:, begin + j] = _round(part[:, j], step, level)
            errors[:, j] = (part[:, j] - rounded[:, begin + j]) / row[0]
            part[:, j + 1 :] -= errors[:, j, None] * row[1:]
        weight[:, end:] -= errors @ factor[begin:end, end:]
    return rounded


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangle F with F^T F = (H + damping)^-1, float32 [d, d]."""
    diagonal = hessian.diagonal().mean().clamp(min=1e-30)
    damped = hessian.double() / diagonal
    damped.diagonal().add_(_DAMPING)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()  # type: ignore[no-any-return]


def _round(values: Tensor, step: Tensor, top: Tensor) -> Tensor:
    """The nearest of the levels -top, 1 - top, ..., top, times the step. All broadcast."""
    return ((values / step + top).round().clamp(min=torch.zeros_like(top), max=2 * top) - top) * step


def _steps(slab: Tensor, top: Tensor, tall: int) -> Tensor:
    """The step of each row of a slab, [n, wide]; `tall` rows share one. top: [n], equal within a group."""
    rows = len(slab)
    padded = nn.functional.pad(slab, (0, 0, 0, -rows % tall), value=float("nan"))  # the last group may be short
    groups, top = padded.reshape(-1, tall * slab.shape[1]), top[::tall]
    largest = groups.nan_to_num().abs().amax(dim=1)
    shares = _SHARES.to(slab.device)
    steps = (shares[:, None] * largest / top).clamp(min=1e-7).half().float()
    rounded = _round(groups, steps[:, :, None], top[:, None].expand(len(_SHARES), -1, -1))
    best = (rounded - groups).square().nansum(dim=2).argmin(dim=0)
    return steps.gather(0, best[None])[0].repeat_interleave(tall)[:rows]


def delta_come(pair: Pair, ids: Tensor) -> Mapping[str, MixedPrecision]:
    """Modules by the name of their layer. ids: int64 [samples, length], the text of the Hessians."""
    hessians = _hessians(pair, ids)
    modules = {}
    for name, teacher, student in pair.linears():
        delta = teacher.weight.detach() - student.weight.detach()
        modules[name] = mixed_precision(delta, hessians.pop(name), delta.numel() // 8)
    return modules


@torch.no_grad()
def _hessians(pair: Pair, ids: Tensor) -> dict[str, Tensor]:
    """The sum over all tokens of x x^T for each linear's inputs in the fine-tune, float32 [d_in, d_in]."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0].reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, 0) + inputs.T @ inputs

        return add

    handles = [teacher.register_forward_pre_hook(hook(name)) for name, teacher, _ in pair.linears()]
    try:
        for i in range(len(ids)):
            pair.teacher(input_ids=ids[i : i + 1], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return sums
