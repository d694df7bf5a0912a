"""Moments: d_in x d_in sums over the inputs of a module.

X   [n, d_in]  the inputs that the student (the compressed stack) feeds the module
X_t [n, d_in]  the inputs that the teacher (the fine-tuned model) feeds it on the same tokens;  Z = X_t - X
W_f, D         fine-tuned weight and delta [d_out, d_in]; biases are exact on both sides and cancel

The student's module must add to its base output the residual  R = X_t W_f^T - X W_b^T = X D^T + Z W_f^T .  With

    G = X^T X     E = Z^T X     F = Z^T Z

everything that a fit needs follows, for every module that reads this input, without computing an output:

    C = R^T X = D G + W_f E
    ||R - X Q^T||^2 = tr(A G A^T) + 2 tr(W_f E A^T) + tr(W_f F W_f^T)      A = D - Q,  Q the fitted delta

No large numbers are subtracted, so the error of a good fit has no cancellation. F is needed for errors only, so it is
summed over the validation tokens alone.

Products of a batch are float32 (TF32 is refused), sums over batches are float64. A batch's product is first rounded to
a grid. The grid is so coarse that float64 holds every sum of its multiples exactly, and so fine (2^-53 of the largest
sum, times the number of batches and a margin) that float32 would not show it. So the result does not depend on the
order of the batches or on the number of processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from peraxis_tools.compress.fit.gram import dot, gram_blocks

__all__ = ["Moments", "Statistics", "Validation", "grid_of"]

_CACHED = 1 << 15  # numbers that are rounded at a time
_MARGIN = 4  # bits: batches may be this much larger than the one that determined the grid


def grid_of(energy: float, batches: int) -> float:
    """The grid for sums over `batches` batches, if `energy` is the largest column's sum of squares in one; 0: none."""
    if not 0.0 < energy < math.inf:
        return 0.0
    return 2.0 ** (math.frexp(energy)[1] + math.ceil(math.log2(max(batches, 1))) + _MARGIN - 53)


@dataclass(slots=True)
class Moments:
    """G, E, F (float64 [d_in, d_in]) over `tokens` tokens. E is None if X_t is taken to equal X; F is None if no error
    is needed. grid: the grid of the sums, 0 for none.
    """

    G: Tensor
    E: Tensor | None
    F: Tensor | None
    tokens: int = 0
    grid: float = 0.0

    @classmethod
    def zeros(
        cls, width: int, *, paired: bool, validates: bool, grid: float = 0.0, device: torch.device | str = "cpu"
    ) -> Moments:
        """Empty moments for inputs of this width. paired: teacher inputs will be given; validates: with F."""

        def empty() -> Tensor:
            return torch.zeros(width, width, dtype=torch.float64, device=device)

        return cls(
            G=empty(), E=empty() if paired else None, F=empty() if paired and validates else None, tokens=0, grid=grid
        )

    def add(self, inputs: Tensor, teacher_inputs: Tensor | None = None) -> None:
        """Add tokens. inputs, teacher_inputs: [n, d_in]; equal rows are the same token."""
        x = inputs.float()
        self._add_square(self.G, x)
        if self.E is not None and teacher_inputs is not None:
            z = teacher_inputs.float() - x
            self._add_on_grid(self.E, z.t() @ x)
            if self.F is not None:
                self._add_square(self.F, z)
        self.tokens += x.shape[0]

    def _add_square(self, total: Tensor, x: Tensor) -> None:
        """total += X^T X; only the blocks on and right of the diagonal are computed."""
        for columns, block in gram_blocks(x):
            self._add_on_grid(total[columns, columns.start :], block)
            total[columns.stop :, columns] = total[columns, columns.stop :].t()

    def _add_on_grid(self, total: Tensor, product: Tensor) -> None:
        """total += the product, rounded to the grid, a few rows at a time so that they stay in the cache."""
        if not self.grid:
            total += product
            return
        # Near 1.5 * 2^52 grids, neighbouring float64 numbers are one grid apart: adding and subtracting rounds.
        far = 1.5 * 2.0**52 * self.grid
        count = max(1, _CACHED // max(1, product.shape[1]))
        for into, rows in zip(total.split(count), product.split(count), strict=True):
            into += rows.double().add_(far).sub_(far)

    def add_isotropic(self, share: float) -> None:
        """Add isotropic inputs: a share of the mean of G's diagonal."""
        diagonal = torch.diagonal(self.G)
        diagonal += share * diagonal.mean()

    def merge(self, other: Moments) -> None:
        """Add the moments of other tokens, in place; F only if both have it."""
        self.G += other.G
        if self.E is not None and other.E is not None:
            self.E += other.E
        if self.F is not None and other.F is not None:
            self.F += other.F
        self.tokens += other.tokens

    def tensors(self) -> list[Tensor]:
        """The tensors of these moments, to be reduced over processes in place."""
        return [tensor for tensor in (self.G, self.E, self.F) if tensor is not None]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Moments of the tokens that a fit may use, and of those that validate it.

    crossed: the two are of different texts, and each validates the fit on the other.
    """

    fit: Moments
    validation: Moments
    crossed: bool = False

    @classmethod
    def none(cls, width: int, *, device: torch.device | str = "cpu") -> Statistics:
        """Statistics of an input without tokens."""
        fit, validation = (Moments.zeros(width, paired=False, validates=False, device=device) for _ in range(2))
        return cls(fit=fit, validation=validation)

    @property
    def tokens(self) -> int:
        """The number of tokens of both."""
        return self.fit.tokens + self.validation.tokens

    def directions(self) -> list[tuple[Moments, Moments]]:
        """(moments of a fit, moments that validate it): the held-out tokens, or, if there are none, those of the fit.

        If crossed, both directions; but only the one with more tokens if the other fit has fewer tokens than inputs.
        """
        if not self.validation.tokens:
            return [(self.fit, self.fit)]
        if not self.fit.tokens:
            return [(self.validation, self.validation)] if self.crossed else [(self.fit, self.validation)]
        ways = [(self.fit, self.validation)]
        if self.crossed:
            ways.append((self.validation, self.fit))
            ways.sort(key=lambda way: -way[0].tokens)
            ways = [way for i, way in enumerate(ways) if i == 0 or way[0].tokens >= len(way[0].G)]
        return ways

    def merged(self) -> Moments:
        """The moments of all tokens. This consumes both, so that their memory is free for the fit."""
        self.fit.merge(self.validation)
        self.validation.G = self.fit.G.new_empty(0, 0)
        self.validation.E = self.validation.F = None
        self.fit.F = None  # errors are those of the parts
        return self.fit


class Validation:
    """The mean squared error of one module's output over some tokens, for any fitted delta."""

    def __init__(self, fine_tuned: Tensor, moments: Moments) -> None:
        """fine_tuned: float32 [d_out, d_in]. The moments are used in float32."""
        self.tokens = moments.tokens
        self._gram = moments.G.float()
        self._cross = None if moments.E is None else fine_tuned @ moments.E.float()
        self._rest = 0.0 if moments.F is None else dot(fine_tuned @ moments.F.float(), fine_tuned)

    def error(self, residual: Tensor) -> float:
        """||R - X Q^T||^2 / n for A = D - Q. residual: A, float32 [d_out, d_in]."""
        error = dot(residual @ self._gram, residual) + self._rest
        if self._cross is not None:
            error += 2 * dot(self._cross, residual)
        return max(error, 0.0) / max(self.tokens, 1)

    def share(self, correction: Tensor) -> float:
        """The share, 0 to 1, of a correction of the delta (float32 [d_out, d_in]) whose error is least."""
        energy = dot(correction @ self._gram, correction)
        if self._cross is None or not energy > 0.0:
            return 1.0
        return min(max(dot(self._cross, correction) / energy, 0.0), 1.0)
