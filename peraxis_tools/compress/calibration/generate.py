"""Text from the fine-tuned model itself: calibration in its own domain, where its data is not at hand.

A fine-tune is made for a domain that a general text such as C4 hardly touches. What it writes when asked for nothing in
particular (ancestral sampling at temperature 1 from the start token) is of that domain, and its own distribution is
exactly what the compressed model is to match. It needs the whole fine-tuned model in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
from peraxis_tools.text import Ids

__all__ = ["generate"]


@torch.no_grad()
def generate(
    teacher: LayerwiseModel,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    batch_size: int,
    progress: Callable[[str, int, int], None],
) -> Ids:
    """Ids int64 [samples, length]. teacher: filled. The same for the same seed, device and number of threads."""
    start = tokenizer.bos_token_id
    vocabulary = teacher.model.get_input_embeddings().get_parameter("weight").shape[0]
    draw = np.random.Generator(np.random.PCG64(seed))
    batches = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in range(0, samples, batch_size):
            progress("generate", first, samples)
            count = min(batch_size, samples - first)
            # Without a start token: any token, as good a start as another.
            column = np.full(count, start) if start is not None else draw.integers(0, vocabulary, count)
            prompt = torch.from_numpy(column.astype(np.int64)[:, None]).to(teacher.device)
            ids = teacher.model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=length - 1,
                min_new_tokens=length - 1,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                use_cache=True,
                pad_token_id=0,
            )
            batches.append(ids[:, :length].cpu().numpy())
        progress("generate", samples, samples)
    return np.concatenate(batches)
