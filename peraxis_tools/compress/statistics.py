"""What calibration leaves behind of a module's inputs: three d_in x d_in sums.

X   [n, d_in]  the inputs that the student (the compressed stack) feeds the module
X_t [n, d_in]  the inputs that the teacher (the fine-tuned model) feeds it on the same tokens;  Z = X_t - X
W_f, D         fine-tuned weight and delta [d_out, d_in]; biases are exact on both sides and cancel

The student's module must add to its base output the residual  R = X_t W_f^T - X W_b^T = X D^T + Z W_f^T .  With

    G = X^T X     E = Z^T X     F = Z^T Z

all that a fit needs follows, for every module that reads this input, and no output is ever computed:

    C = R^T X = D G + W_f E
    ||R - X Q^T||^2 = tr(A G A^T) + 2 tr(W_f E A^T) + tr(W_f F W_f^T)      A = D - Q,  Q the stored delta

Nothing large is subtracted from anything large, so the error of a good fit is exact to the last digits.
Products of a batch are float32 (TF32 is refused), sums over batches float64, in the order of the samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "Statistics", "squared_error"]


@dataclass(slots=True)
class Moments:
    """G, E, F (float64 [d_in, d_in]) over `tokens` tokens. E and F are None where X_t was taken to equal X."""

    G: Tensor
    E: Tensor | None
    F: Tensor | None
    tokens: int = 0

    @classmethod
    def zeros(cls, width: int, *, paired: bool, device: torch.device | str = "cpu") -> Moments:
        """Empty sums for inputs of this width; `paired` where teacher inputs will be given."""

        def empty() -> Tensor:
            return torch.zeros(width, width, dtype=torch.float64, device=device)

        return cls(G=empty(), E=empty() if paired else None, F=empty() if paired else None)

    def add(self, inputs: Tensor, teacher_inputs: Tensor | None = None) -> None:
        """Add tokens. inputs, teacher_inputs: [n, d_in], row for row the same tokens."""
        x = inputs.float()
        self.G += x.t() @ x
        if self.E is not None and self.F is not None and teacher_inputs is not None:
            z = teacher_inputs.float() - x
            self.E += z.t() @ x
            self.F += z.t() @ z
        self.tokens += x.shape[0]

    def __add__(self, other: Moments) -> Moments:
        def plus(left: Tensor | None, right: Tensor | None) -> Tensor | None:
            return None if left is None or right is None else left + right

        return Moments(
            G=self.G + other.G,
            E=plus(self.E, other.E),
            F=plus(self.F, other.F),
            tokens=self.tokens + other.tokens,
        )

    def tensors(self) -> list[Tensor]:
        """The sums, to be reduced over processes in place."""
        return [tensor for tensor in (self.G, self.E, self.F) if tensor is not None]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums over the tokens that a fit may use, and over those that only judge it."""

    fit: Moments
    held_out: Moments

    @property
    def total(self) -> Moments:
        """Both together: what the chosen variant is fitted on in the end."""
        return self.fit + self.held_out


def squared_error(residual: Tensor, fine_tuned: Tensor, moments: Moments) -> float:
    """||R - X Q^T||^2 for residual A = D - Q. residual, fine_tuned: [d_out, d_in] float32."""
    a = residual.float()
    error = _dot(a @ moments.G.float(), a)
    if moments.E is not None and moments.F is not None:
        error += 2 * _dot(fine_tuned @ moments.E.float(), a)
        error += _dot(fine_tuned @ moments.F.float(), fine_tuned)
    return max(error, 0.0)


def _dot(left: Tensor, right: Tensor) -> float:
    return float(torch.sum(left * right, dtype=torch.float64))
