"""Compare two models on the same tokens, batch by batch.

Logits become float32 log-probabilities (log-softmax), sums over tokens are float64. Memory holds the logits of one
batch for both models, or of those of its samples that fit into 128 MiB, and the log-probabilities of _POSITIONS
positions: about 130 MB per copy with a vocabulary of 128,256 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from peraxis_tools.evaluate.types import Fidelity, SpecialToken, Tail, WorstToken

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["compare"]

_POSITIONS: Final = 256
_LOGITS_BYTES: Final = 128 << 20  # of one model, in float32
_FLOAT: Final = 4
_WORST: Final = 10  # tokens to show
_CONTEXT: Final = 12  # tokens up to and including such a token
_QUANTILE_MOST: Final = 1 << 24  # values that torch.quantile accepts


@torch.no_grad()
def compare(
    reference_model: PreTrainedModel | Any,
    candidate_model: PreTrainedModel | Any,
    token_batches: Iterable[Tensor],
    *,
    special: Collection[int] = (),
) -> Fidelity:
    """The candidate's fidelity to the reference (the fine-tuned model).

    token_batches: int64 [samples, length], length >= 2, no padding; each sample is one context. All tokens but the
    first of a sample are predicted: samples * (length - 1) tokens count. Batches are moved to each model's device.
    special: ids of the tokenizer's special tokens. Raises ValueError if there is no token to predict, or the
    vocabularies differ.
    """
    sums: list[Tensor] = []  # one row [4] per sample: KL, agreements, candidate's loss, reference's loss
    each: list[Tensor] = []  # KL at each position, float32 [length - 1] per sample
    read: list[Tensor] = []
    tokens = 0
    for ids in _bounded(token_batches, candidate_model):
        read.extend(ids)
        ours = _logits(candidate_model, ids)
        theirs = _logits(reference_model, ids).to(ours.device)
        if ours.shape != theirs.shape:
            raise ValueError(f"vocabularies of {theirs.shape[-1]} and {ours.shape[-1]} tokens cannot be compared")
        tokens += ours.shape[0] * ours.shape[1]
        for p, q, t in zip(theirs, ours, ids[:, 1:].to(ours.device), strict=True):
            total, positions = _sample(p, q, t)
            sums.append(total)
            each.append(positions)
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
        tail=_tail(read, each, special),
    )


def _bounded(token_batches: Iterable[Tensor], model: Any) -> Iterator[Tensor]:
    """The batches, in parts whose logits take at most _LOGITS_BYTES, or of one sample each."""
    config = getattr(model, "config", None)
    vocabulary = 1 if config is None else config.get_text_config().vocab_size
    for ids in token_batches:
        yield from ids.split(max(1, _LOGITS_BYTES // (_FLOAT * ids.shape[1] * vocabulary)))


def _tail(read: Sequence[Tensor], each: Sequence[Tensor], special: Collection[int]) -> Tail:
    """read: the ids of each sample; each: the KL of the prediction after each token but the last."""
    ids = torch.cat([sample[:-1] for sample in read])
    kl = torch.cat(list(each)).double()
    order = torch.argsort(kl, descending=True, stable=True)
    places = [(sample, position) for sample, found in enumerate(each) for position in range(len(found))]
    worst = []
    for index in order[:_WORST][kl[order[:_WORST]] > 0].tolist():
        sample, position = places[index]
        context = read[sample][max(0, position + 1 - _CONTEXT) : position + 1].tolist()
        worst.append(WorstToken(kl=float(kl[index]), sample=sample, position=position, context=tuple(context)))
    after = {}
    for token in sorted(set(special)):
        chosen = kl[ids == token]
        if len(chosen):
            after[token] = SpecialToken(token=token, count=len(chosen), kl=float(chosen.mean()))
    hundredth = max(1, len(kl) // 100)
    return Tail(
        median=float(kl.median()),
        percentile_99=float(torch.quantile(kl, 0.99)) if len(kl) <= _QUANTILE_MOST else float(kl[order[hundredth - 1]]),
        share_of_worst_1=float(kl[order[:hundredth]].sum() / kl.sum()) if float(kl.sum()) > 0 else 0.0,
        worst=tuple(worst),
        special=tuple(after.values()),
    )


def _logits(model: Any, ids: Tensor) -> Tensor:
    """The logits that predict tokens 1, 2, ...: [samples, length - 1, vocabulary]."""
    logits: Tensor = model(input_ids=ids[:, :-1].to(model.device), use_cache=False).logits
    return logits


def _sample(theirs: Tensor, ours: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over one sample, and the KL at each position.

    theirs, ours: [n, vocabulary]; targets: [n]. Returns float64 [4] and float32 [n].
    """
    each = []
    total = torch.zeros(4, dtype=torch.float64, device=ours.device)
    for p, q, t in zip(theirs.split(_POSITIONS), ours.split(_POSITIONS), targets.split(_POSITIONS), strict=True):
        log_p, log_q = (torch.log_softmax(x.float(), dim=-1) for x in (p, q))
        total[1] += torch.sum(p.argmax(dim=-1) == q.argmax(dim=-1))
        total[2] -= torch.sum(log_q.gather(1, t[:, None]), dtype=torch.float64)
        total[3] -= torch.sum(log_p.gather(1, t[:, None]), dtype=torch.float64)
        probability = log_p.exp()
        terms = probability * log_p.sub_(log_q)
        total[0] += torch.sum(terms, dtype=torch.float64)
        each.append(terms.sum(dim=-1))
    return total.cpu(), torch.cat(each).cpu()


def _standard_error(sums: Tensor, tokens: int) -> float | None:
    """The standard error of the mean over samples, because samples are independent but tokens within one are not."""
    count = len(sums)
    if count < 2:
        return None
    return float(sums.std() / (tokens / count)) / math.sqrt(count)
