"""Two models on the same tokens, batch by batch.

Logits become float32 log-probabilities (log-softmax), sums over tokens are float64. At any moment memory holds the
logits of one batch for both models, and log-probabilities of _POSITIONS positions: with 128,256 tokens of vocabulary
some 130 MB a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from peraxis_tools.evaluate.types import Fidelity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["compare"]

_POSITIONS: Final = 256


@torch.no_grad()
def compare(
    reference_model: PreTrainedModel | Any, candidate_model: PreTrainedModel | Any, token_batches: Iterable[Tensor]
) -> Fidelity:
    """The candidate's fidelity to the reference (the fine-tuned model).

    token_batches: int64 [samples, length], length >= 2, no padding; each sample is one context. The last token of
    a sample is predicted and predicts nothing: samples * (length - 1) tokens count. Batches are moved to each model's
    device. Raises ValueError where there is no token to predict, or the vocabularies differ.
    """
    sums: list[Tensor] = []  # one row [4] a sample: KL, agreements, candidate's loss, reference's loss
    tokens = 0
    for ids in token_batches:
        ours = _logits(candidate_model, ids)
        theirs = _logits(reference_model, ids).to(ours.device)
        if ours.shape != theirs.shape:
            raise ValueError(f"vocabularies of {theirs.shape[-1]} and {ours.shape[-1]} tokens cannot be compared")
        tokens += ours.shape[0] * ours.shape[1]
        sums.extend(_sample(p, q, t) for p, q, t in zip(theirs, ours, ids[:, 1:].to(ours.device), strict=True))
    if tokens == 0:
        raise ValueError("no token to predict: samples need at least two tokens")
    table = torch.stack(sums)  # [samples, 4] float64
    mean = (table.sum(dim=0) / tokens).tolist()
    return Fidelity(
        tokens=tokens,
        kl=mean[0],
        kl_error=_standard_error(table[:, 0], tokens),
        top1=mean[1],
        loss=mean[2],
        loss_fine_tuned=mean[3],
    )


def _logits(model: Any, ids: Tensor) -> Tensor:
    """[samples, length - 1, vocabulary]: what predicts tokens 1, 2, ..."""
    logits: Tensor = model(input_ids=ids[:, :-1].to(model.device), use_cache=False).logits
    return logits


def _sample(theirs: Tensor, ours: Tensor, targets: Tensor) -> Tensor:
    """Sums over one sample. theirs, ours: [n, vocabulary]; targets: [n]. Returns float64 [4]."""
    total = torch.zeros(4, dtype=torch.float64, device=ours.device)
    for p, q, t in zip(theirs.split(_POSITIONS), ours.split(_POSITIONS), targets.split(_POSITIONS), strict=True):
        log_p, log_q = (torch.log_softmax(x.float(), dim=-1) for x in (p, q))
        total[1] += torch.sum(p.argmax(dim=-1) == q.argmax(dim=-1))
        total[2] -= torch.sum(log_q.gather(1, t[:, None]), dtype=torch.float64)
        total[3] -= torch.sum(log_p.gather(1, t[:, None]), dtype=torch.float64)
        probability = log_p.exp()
        total[0] += torch.sum(probability * log_p.sub_(log_q), dtype=torch.float64)
    return total.cpu()


def _standard_error(sums: Tensor, tokens: int) -> float | None:
    """Of the mean over samples: tokens within a sample are not independent, samples are."""
    count = len(sums)
    if count < 2:
        return None
    return float(sums.std() / (tokens / count)) / math.sqrt(count)
