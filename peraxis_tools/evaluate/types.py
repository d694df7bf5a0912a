"""The results of an evaluation. They need no torch.

With p the fine-tuned model's next-token distribution, q the candidate's, and N predicted tokens t:

    kl          mean of sum_v p(v) (log p(v) - log q(v))                      nats per token; 0 is the same model
    top1        share of positions where both have the same most likely token
    perplexity  exp(loss),  loss = mean of -log q(t)
    recovered   (loss_base - loss_candidate) / (loss_base - loss_fine_tuned)  1 is the fine-tune, 0 the base
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = [
    "CANDIDATES",
    "DomainResult",
    "EvaluateResult",
    "Fidelity",
    "SpecialToken",
    "Tail",
    "TaskResult",
    "WorstToken",
    "recovered_fraction",
]

# base: without the delta. merged: weights rounded to their dtype, as `apply` writes them. on-the-fly: base plus
# components in binary32, unrounded, as a server of many variants computes them.
CANDIDATES: Final = ("base", "merged", "on-the-fly")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstToken:
    """A position with a large KL. context: the last token ids up to it; text: the decoded context."""

    kl: float
    sample: int
    position: int
    context: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialToken:
    """The mean KL of the prediction after a special token, over its occurrences in the text."""

    token: int
    count: int
    kl: float
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """KL by position, in nats, which shows large local errors that a good mean hides.

    share_of_worst_1: the share of the total KL in the worst 1% of the positions. worst: empty for equal models.
    """

    median: float
    percentile_99: float
    share_of_worst_1: float
    worst: tuple[WorstToken, ...]
    special: tuple[SpecialToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """One candidate compared with the fine-tuned model, on the same tokens.

    kl_error: standard error of kl, from the spread between samples; None for a single sample.
    """

    tokens: int
    kl: float
    kl_error: float | None
    top1: float
    loss: float
    loss_fine_tuned: float
    tail: Tail

    @property
    def perplexity(self) -> float:
        """The perplexity of the candidate."""
        return math.exp(self.loss)

    @property
    def perplexity_fine_tuned(self) -> float:
        """The perplexity of the fine-tuned model."""
        return math.exp(self.loss_fine_tuned)


def recovered_fraction(*, base: float, candidate: float, fine_tuned: float) -> float | None:
    """The share of the fine-tune's gain over the base that the candidate recovers, from three losses.

    None if the fine-tune gains nothing (for example on text outside its domain).
    """
    return (base - candidate) / (base - fine_tuned) if fine_tuned < base else None


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainResult:
    """The result of one text. candidates, recovered: by name of CANDIDATES; a base of another vocabulary is left out.

    seen: the delta was fitted on these tokens, or on a text of this name, so its figures may be too good.
    """

    domain: str
    source: str
    digest: str
    samples: int
    sequence_length: int
    tokens: int
    perplexity_fine_tuned: float
    candidates: Mapping[str, Fidelity]
    perplexity: Mapping[str, float]
    recovered: Mapping[str, float | None]
    seen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """One task of lm-eval: one metric (acc_norm if it has one), its value and standard error by model."""

    task: str
    metric: str
    samples: int | None
    scores: Mapping[str, float]
    errors: Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateResult:
    """The result of `evaluate`: fidelity by domain, and tasks.

    other_fine_tune: why the checkpoint is not the one that the delta was made from, or may not be; None otherwise.
    """

    base: str
    fine_tuned: str
    delta: str
    content_id: str
    bytes: int
    other_fine_tune: str | None
    domains: tuple[DomainResult, ...]
    tasks: tuple[TaskResult, ...]

    @property
    def worst(self) -> DomainResult | None:
        """The text with the largest KL of the merged model, NaN before all; None without texts."""
        return max(self.domains, key=_merged_kl, default=None)


def _merged_kl(domain: DomainResult) -> tuple[bool, float]:
    kl = domain.candidates["merged"].kl
    return math.isnan(kl), kl
