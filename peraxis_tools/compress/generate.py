"""Text from the fine-tuned model itself: calibration in its own domain, where its data is not at hand.

A fine-tune is made for a domain that a general text such as C4 hardly touches. What it writes when asked for nothing in
particular (ancestral sampling at temperature 1 from the start token) is of that domain, and its own distribution is
exactly what the compressed model is to match. So that the general text is not forgotten over it, every other sample
goes on from the beginning of a sample of that text. It needs the whole fine-tuned model in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from peraxis_tools.compress.calibration import Ids
from peraxis_tools.compress.skeleton import Skeleton

__all__ = ["generate"]


_BEGINNING = 8  # what is given of a sample of the text: one part in so many


@torch.no_grad()
def generate(teacher: Skeleton, tokenizer: Any, text: Ids, *, samples: int, seed: int, batch_size: int) -> Ids:
    """Ids int64 [samples, length], as long as text's. teacher: filled.

    The same for the same seed, device and number of threads. Even ones begin with nothing, odd ones with text
    [n, length]: any part of them has its share of both.
    """
    going_on = samples // 2
    beginnings = text[np.arange(going_on) % len(text), : max(1, text.shape[1] // _BEGINNING)]
    written = np.empty((samples, text.shape[1]), np.int64)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for first, prompts in enumerate((_nothing(teacher, tokenizer, samples - going_on, seed), beginnings)):
            parts = np.split(prompts, range(batch_size, len(prompts), batch_size)) if len(prompts) else []
            for at, part in enumerate(parts):
                rows = first + 2 * (at * batch_size + np.arange(len(part)))
                written[rows] = _continued(teacher, part, length=text.shape[1])
    return written


def _nothing(teacher: Skeleton, tokenizer: Any, samples: int, seed: int) -> Ids:
    """The start token, [samples, 1]; without one any token, as good a start as another."""
    if tokenizer.bos_token_id is not None:
        return np.full((samples, 1), tokenizer.bos_token_id, np.int64)
    vocabulary = teacher.model.get_input_embeddings().weight.shape[0]
    return np.random.Generator(np.random.PCG64(seed)).integers(0, vocabulary, (samples, 1))


def _continued(teacher: Skeleton, prompts: Ids, *, length: int) -> Ids:
    """Prompts [n, k] and what the model writes after them, [n, length]."""
    ids = torch.from_numpy(np.ascontiguousarray(prompts)).to(teacher.device)
    new = length - ids.shape[1]
    written = teacher.model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        use_cache=True,
        pad_token_id=0,
    )
    return written[:, :length].cpu().numpy()
