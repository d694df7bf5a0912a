"""Text that the fine-tuned model generates: calibration in its own domain when its training data is not available.

A fine-tune is made for a domain that a general text such as C4 hardly covers. Text that the model generates is of that
domain. Sampling is ancestral at temperature 1: this is the model's own distribution, which the compressed model should
match. A sample depends on its start, so there are several starts (`starts_of`): the beginning of a text, the end of
another text, each role of the chat template, and a few prompts. It continues after an end-of-text token, because
training packs documents in the same way; so calibration reads these tokens too. A long sample is packed from several
pieces, each with a start of its own: more starts are read, and a step of generation, which reads all weights, serves
more of them.

This needs the whole fine-tuned model in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from peraxis_tools.compress.calibration.partition import pieces_of
from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
from peraxis_tools.process.heap import trim_heap
from peraxis_tools.texts.chat_template import chat_template_of
from peraxis_tools.texts.encoding import token_ids
from peraxis_tools.texts.samples import Ids

__all__ = ["draw_tokens", "generate", "starts_of"]

_PROMPTS: Final = ("The ", "How do I ", "What is ", "Write a short ", "Explain ", "def ", "Q: ")
_TRIM_STEPS: Final = 16
_MARK: Final = "\u241fpart\u241f"  # stands for the text of a turn; no template writes it


def starts_of(tokenizer: Any) -> list[list[int]]:
    """Token ids that samples start with, the most important first; empty if the tokenizer defines no start."""
    begin: Any = getattr(tokenizer, "bos_token_id", None)
    end: Any = getattr(tokenizer, "eos_token_id", None)
    # Consecutive documents are joined as the tokenizer joins them: each with a start token, or without.
    led = begin is not None and begin in token_ids(tokenizer, "a")[:1]
    after_end = [end, begin] if led and end != begin else [end]
    starts: list[list[int]] = [start for start in ([begin], after_end) if None not in start]
    if not starts:
        return []

    starts += [token_ids(tokenizer, text, special=False) for text in _template_starts(tokenizer)]
    starts += [[*starts[0], *token_ids(tokenizer, prompt, special=False)] for prompt in _PROMPTS]
    found: list[list[int]] = []
    for start in starts:
        if start and start not in found:
            found.append(start)
    return found


def _template_starts(tokenizer: Any) -> list[str]:
    """The chat template's output up to the first character of a system turn, a user turn and a model turn."""
    begun: list[str] = []
    with chat_template_of(tokenizer) as render:
        if render is None:
            return []
        for roles in (("user",), ("user", "assistant"), ("system", "user")):
            written = render([{"role": role, "content": f"{_MARK}{i}"} for i, role in enumerate(roles)])
            if written is None:
                continue
            if roles == ("user", "assistant"):
                for prompt in _PROMPTS[1:4]:
                    head, _, _ = written.partition(f"{_MARK}1")
                    begun.append(head.replace(f"{_MARK}0", f"{prompt.strip()} this?"))
            else:
                begun.append(written.partition(f"{_MARK}0")[0])
    return begun


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
    """Generate ids, int64 [samples, length], with a filled teacher. Equal seed, device and threads give equal ids.

    batch_size: samples that are generated together.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    vocabulary = teacher.model.get_input_embeddings().get_parameter("weight").shape[0]
    starts = starts_of(tokenizer)
    count, tokens = pieces_of(length, start=max(map(len, starts), default=0))
    starts = [start[: tokens - 1] for start in starts]
    # Without a defined start, each token is as good a start as another.
    starts = starts or [[int(token)] for token in draw.integers(0, vocabulary, min(samples, 8))]
    batches = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in range(0, samples, batch_size):
            progress("generate", first, samples)
            rows = range(count * first, count * min(first + batch_size, samples))
            batches.append(_continued(teacher, [starts[i % len(starts)] for i in rows], length=tokens))
        progress("generate", samples, samples)
    pieces = np.concatenate(batches)[draw.permutation(count * samples)]
    return np.ascontiguousarray(pieces.reshape(samples, count * tokens)[:, :length])


def _continued(teacher: LayerwiseModel, starts: Sequence[Sequence[int]], *, length: int) -> Ids:
    """Pieces int64 [starts, length], all in one batch with the model's key-value cache.

    Shorter starts are padded on the left and masked, so that all rows continue at the same step.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    longest = max(map(len, starts))
    pads = [longest - len(start) for start in starts]
    prompt = torch.tensor([[0] * pad + list(start) for pad, start in zip(pads, starts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
    # The model's own generation configuration would end samples at an end-of-text token and restrict the sampling.
    own = teacher.model.generation_config
    plain = GenerationConfig(
        do_sample=False,  # the most likely token of what _Drawn returns, which is the drawn one
        use_cache=True,
        max_new_tokens=length - longest + max(pads),
        eos_token_id=None,
        pad_token_id=0,
    )
    teacher.model.generation_config = plain
    model: Any = teacher.model
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(_contiguous) if isinstance(head, torch.nn.Module) else nullcontext()
    try:
        with hook:
            ids = model.generate(
                prompt.to(teacher.device),
                attention_mask=mask.to(teacher.device),
                generation_config=plain,
                logits_processor=LogitsProcessorList([_Drawn()]),
            )
    finally:
        teacher.model.generation_config = own
    rows = [row[pad : pad + length] for row, pad in zip(ids.cpu().numpy(), pads, strict=True)]
    found: Ids = np.stack(rows)
    return found


def _contiguous(_head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The states of the last tokens in one piece: torch copies the head's weights once a row for a strided view."""
    return tuple(value.contiguous() for value in inputs)


def draw_tokens(logits: Tensor) -> Tensor:
    """A token of each row at temperature 1, int64 [n, 1]. logits: float32 [n, vocabulary].

    One random number for each row and the cumulative distribution take a tenth of the time of torch.multinomial, which
    draws a number for each token of the vocabulary.
    """
    below = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    draws = torch.rand(len(logits), 1, device=logits.device) * below[:, -1:]
    return torch.searchsorted(below, draws, right=True).clamp_(max=logits.shape[-1] - 1)


class _Drawn:
    """Leaves a drawn token of each row alone; all others get scores of minus infinity.

    At times it returns freed memory: each step makes longer keys and values, which do not fit where the former were.
    """

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids: [n, length]; scores: logits [n, vocabulary]."""
        if ids.shape[1] % _TRIM_STEPS == 0:
            trim_heap()
        return torch.full_like(scores, -torch.inf).scatter_(1, draw_tokens(scores.float()), 0.0)
