"""The updates that updates.py measures: drawn, and real steps of training on masters in binary32.

Cold: masters are the checkpoint's own BF16 weights. Warm: they lie anywhere between two roundings, as after a long run.
All steps of a sequence are made first and kept as updates, so that the model is not in memory while they are measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from update_wires import Words

from peraxis_format.dtypes import DType, from_float32
from peraxis_format.ops.exact import apply, encode

__all__ = ["Update", "drawn", "policy_gradient", "supervised"]

STEPS = (3e-9, 1e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
RATES = (1e-6, 1e-5, 1e-4)
PROMPT, ANSWER, SAMPLES = 16, 32, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """BF16 weights before and after, as bit patterns."""

    label: str
    old: Words
    new: Words


def drawn(count: int) -> Iterator[Update]:
    """Gaussian steps of several sizes, from masters between two roundings: a step of the exponent halves the share."""
    random = np.random.default_rng(0)
    rounded = from_float32((random.standard_normal(count) * 0.02).astype(np.float32), DType.BF16)
    exact = (rounded.astype(np.uint32) << np.uint32(16)).view(np.float32)
    ulp = np.exp2(np.floor(np.log2(np.abs(exact) + 1e-30)) - 7).astype(np.float32)
    master = exact + (random.random(count, np.float32) - np.float32(0.5)) * ulp * np.float32(0.9999)
    old = from_float32(master, DType.BF16)
    for step in STEPS:
        move = np.clip(random.standard_normal(count, np.float32), -3, 3) * np.float32(step)
        yield Update(label=f"step {step:g}", old=old, new=from_float32(master + move, DType.BF16))


def supervised(folder: Path, text: Path, steps: int, threads: int) -> Iterator[Update]:
    """Fine-tuning on a text: AdamW steps of 2 samples of at most 256 tokens."""
    tokens = _tokens(folder, text, 2 * steps, 256)

    def backward(model: Any, step: int) -> None:
        for ids in tokens[2 * step : 2 * step + 2]:
            (model(input_ids=ids, labels=ids).loss / 2).backward()

    yield from _sequences("SFT", folder, backward, steps, threads)


def policy_gradient(folder: Path, text: Path, steps: int, threads: int) -> Iterator[Update]:
    """REINFORCE: AdamW steps of 8 sampled answers to one prompt of the text, 32 tokens each.

    The reward is the share of distinct tokens in an answer; the baseline is the mean reward of the 8 answers.
    """
    import torch

    prompts = _tokens(folder, text, steps, PROMPT)

    def backward(model: Any, step: int) -> None:
        prompt = prompts[step]
        with torch.no_grad():
            ids = model.generate(
                prompt.expand(SAMPLES, -1),
                attention_mask=torch.ones(SAMPLES, prompt.shape[1], dtype=torch.long),
                min_new_tokens=ANSWER,
                max_new_tokens=ANSWER,
                do_sample=True,
                pad_token_id=0,
            )
        answers = ids[:, prompt.shape[1] :]
        reward = torch.tensor([len(set(answer.tolist())) / ANSWER for answer in answers])
        logits = model(input_ids=ids).logits[:, prompt.shape[1] - 1 : -1]
        chosen = logits.log_softmax(-1).gather(2, answers[..., None])[..., 0].mean(1)
        (-(reward - reward.mean()) * chosen).mean().backward()

    yield from _sequences("REINFORCE", folder, backward, steps, threads)


def _tokens(folder: Path, text: Path, count: int, length: int) -> Sequence[Any]:
    """Token IDs of the first rows of a text, each cut to a length. Raises ValueError if it has too few rows."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    lines = text.read_text("utf-8").splitlines()
    if len(lines) < count:
        raise ValueError(f"{text}: {len(lines)} rows; the steps read {count}")
    return [tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids[:, :length] for line in lines[:count]]


def _sequences(
    kind: str, folder: Path, backward: Callable[[Any, int], None], steps: int, threads: int
) -> Iterator[Update]:
    """The first and the last step at each rate, cold and warm."""
    for warm in (False, True):
        for rate in RATES:
            first, made = _trained(folder, backward, rate, steps, warm=warm, threads=threads)
            for i, (index, data) in enumerate(made):
                after = first.copy()
                apply(after, index, data, DType.BF16, threads=threads)
                if i in (0, steps - 1):
                    label = f"{kind} {'warm' if warm else 'cold'} {rate:g} #{i + 1}"
                    yield Update(label=label, old=first, new=after)
                first = after


def _trained(
    folder: Path, backward: Callable[[Any, int], None], rate: float, steps: int, *, warm: bool, threads: int
) -> tuple[Words, list[tuple[Any, Any]]]:
    """The weights at the start, and the update of each step. backward: adds the gradients of a step to the model's."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if warm:
        _move_between_roundings(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    first = before = _flat(model)
    made = []
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        after = _flat(model)
        made.append(encode(before, after, DType.BF16, threads=threads))
        before = after
    return first, made


def _flat(model: Any) -> Words:
    """All weights, in BF16."""
    import torch

    parts = [p.detach().bfloat16().reshape(-1).view(torch.int16).numpy() for p in model.parameters()]
    return np.concatenate(parts).view(np.uint16)


def _move_between_roundings(model: Any) -> None:
    """Move the masters to anywhere between two roundings of their BF16 weights."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            ulp = torch.exp2(torch.floor(torch.log2(parameter.abs() + 1e-30)) - 7)
            parameter += (torch.rand_like(parameter) - 0.5) * ulp * 0.9999
