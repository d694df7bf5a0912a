"""Sizes that the fit uses and the estimate of its memory counts (plan/estimate.py). It imports no torch."""

from __future__ import annotations

from typing import Final

__all__ = ["BYTES_A_SIGN", "LOGITS_BYTES", "TRIAL_ROWS"]

BYTES_A_SIGN: Final = 4  # of a sign that distillation trains (distill/latents.py)
LOGITS_BYTES: Final = 32 << 20  # of logits at a time; a loss and its gradient take some five times as much
TRIAL_ROWS: Final = 128  # a part of a matrix's rows is enough to measure how much signs overfit to a text
