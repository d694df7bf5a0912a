"""Exact updates against the wires of other systems, written here from their published descriptions.

    python benchmarks/updates.py [--weights 5242880] [--model FOLDER] [--sequence FOLDER --text FILE] [--threads 1]

    int32        index and new value of each changed weight, 6 bytes (vLLM, verl, vime, prime-rl)
    gaps + XOR   gaps between changed weights, XOR of old and new value, each under zstd 1 (NeMo-RL)
    COO + zstd   int32 differences of indices beside new values, zstd 1 (PULSE)
    XOR + zstd   XOR of the whole tensor, zstd 1 (slime, SkyRL)

Updates are drawn: BF16 weights of masters that lie anywhere between two roundings, moved by a Gaussian step, so that
the share that changes halves with each exponent. With --model they are real: AdamW on masters in binary32, warmed up.
With --sequence they are consecutive steps on a text, for a model of any size: from the checkpoint's own weights (cold),
and from masters that lie between two roundings, as after a long run (warm).
Bytes are for each changed weight, with index; `bound` is the entropy of the step given the old exponent. Speeds: GB of
BF16 weights a second of this thread's CPU time, decoded and applied, the best of several runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from peraxis_format.dtypes import DType, from_float32
from peraxis_format.ops.exact import apply, encode

Words = NDArray[np.uint16]
STEPS = (3e-9, 1e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
ZSTD: Any = import_module("pyarrow").Codec("zstd", compression_level=1)


@numba.njit
def _scatter(weights: Any, index: Any, values: Any) -> None:
    for j in range(index.size):
        weights[index[j]] = values[j]


@numba.njit
def _scatter_gaps(weights: Any, gaps: Any, values: Any, xor: Any) -> None:
    place = -1
    for j in range(gaps.size):
        place += 1 + gaps[j]
        weights[place] = weights[place] ^ values[j] if xor else values[j]


@numba.njit
def _xor(weights: Any, other: Any) -> None:
    for i in range(weights.size):
        weights[i] ^= other[i]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """One wire's bytes of an update, and what applies them in place."""

    name: str
    size: int
    apply: Callable[[Words], None]


def _compressed(array: NDArray[Any]) -> tuple[bytes, Callable[[], NDArray[Any]]]:
    packed = ZSTD.compress(array, asbytes=True)
    return packed, lambda: np.frombuffer(ZSTD.decompress(packed, array.nbytes), array.dtype)


def wires(old: Words, new: Words) -> Iterator[Wire]:
    """The peers' wires of one update."""
    index = np.flatnonzero(old != new).astype(np.int32)
    values, xored = new[index], old ^ new
    yield Wire(name="int32", size=6 * index.size, apply=lambda w: _scatter(w, index, values))
    gaps = np.diff(index, prepend=-1) - 1
    gaps = gaps.astype(np.uint16 if gaps.max(initial=0) < 65536 else np.uint32)
    places, unpacked_gaps = _compressed(gaps)
    patterns, unpacked_xor = _compressed(xored[index])
    size = len(places) + len(patterns)
    yield Wire(name="gaps+XOR", size=size, apply=lambda w: _scatter_gaps(w, unpacked_gaps(), unpacked_xor(), True))
    coo, unpacked_coo = _compressed(np.diff(index, prepend=-1) - 1)
    plain, unpacked_values = _compressed(values)
    size = len(coo) + len(plain)
    yield Wire(name="COO+zstd", size=size, apply=lambda w: _scatter_gaps(w, unpacked_coo(), unpacked_values(), False))
    whole, unpacked_whole = _compressed(xored)
    yield Wire(name="XOR+zstd", size=len(whole), apply=lambda w: _xor(w, unpacked_whole()))


def ours(old: Words, new: Words, threads: int) -> Iterator[Wire]:
    """The two modes of exact updates."""
    for prefer in ("size", "speed"):
        index, data = encode(old, new, DType.BF16, prefer=prefer, threads=threads)

        def run(weights: Words, index: Any = index, data: Any = data) -> None:
            apply(weights, index, data, DType.BF16, threads=threads)

        yield Wire(name="keyed" if prefer == "size" else "gaps", size=index.nbytes + data.nbytes, apply=run)


def bound(old: Words, new: Words) -> float:
    """Bytes: the entropy of the step given the exponent of the old weight."""

    def ordinal(u: Words) -> NDArray[np.int32]:
        wide = u.astype(np.int32)
        return np.where(wide & 0x8000, wide ^ 0xFFFF, wide ^ 0x8000)

    moved = np.flatnonzero(old != new)
    before, after = old[moved], new[moved]
    steps, exponents = ordinal(after) - ordinal(before), (before >> 7) & 255
    weights = np.bincount((old >> 7) & 255, minlength=256)
    bits = 0.0
    for e in np.unique(exponents):
        _, some = np.unique(steps[exponents == e], return_counts=True)
        counts = np.append(some, weights[e] - some.sum())
        counts = counts[counts > 0]
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    return bits / 8


def best(run: Callable[[Words], object], old: Words, *, repeats: int = 5, threads: int = 1) -> float:
    """GB of weights a second: CPU time of this thread, or with several threads wall time."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    times = []
    for _ in range(repeats):
        weights = old.copy()
        begin = clock()
        run(weights)
        times.append(clock() - begin)
    return old.nbytes / min(times) / 1e9


def drawn(count: int) -> Iterator[tuple[str, Words, Words]]:
    """Updates by size of the step."""
    random = np.random.default_rng(0)
    rounded = from_float32((random.standard_normal(count) * 0.02).astype(np.float32), DType.BF16)
    exact = (rounded.astype(np.uint32) << np.uint32(16)).view(np.float32)
    ulp = np.exp2(np.floor(np.log2(np.abs(exact) + 1e-30)) - 7).astype(np.float32)
    master = exact + (random.random(count, np.float32) - np.float32(0.5)) * ulp * np.float32(0.9999)
    old = from_float32(master, DType.BF16)
    for step in STEPS:
        move = np.clip(random.standard_normal(count, np.float32), -3, 3) * np.float32(step)
        yield f"step {step:g}", old, from_float32(master + move, DType.BF16)


def flat(model: Any) -> Words:
    """All weights, in BF16."""
    import torch

    parts = [p.detach().bfloat16().reshape(-1).view(torch.int16).numpy() for p in model.parameters()]
    return np.concatenate(parts).view(np.uint16)


def between_roundings(model: Any) -> None:
    """Move the masters to anywhere between two roundings of their BF16 weights."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            ulp = torch.exp2(torch.floor(torch.log2(parameter.abs() + 1e-30)) - 7)
            parameter += (torch.rand_like(parameter) - 0.5) * ulp * 0.9999


def sequence(folder: Path, text: Path, steps: int, threads: int) -> Iterator[tuple[str, Words, Words]]:
    """Consecutive AdamW steps on a text: 2 samples of at most 256 tokens, at two rates, cold and warm.

    All steps are made first and kept as updates, so that the model is not in memory while they are measured.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in text.read_text("utf-8").splitlines()]
    for rate, warm in ((1e-6, False), (1e-5, False), (1e-6, True), (1e-5, True)):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if warm:
            between_roundings(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        first, before = flat(model), flat(model)
        made = []
        for i in range(steps):
            batch = [tokenizer(each, return_tensors="pt").input_ids[:, :256] for each in texts[2 * i : 2 * i + 2]]
            for ids in batch:
                (model(input_ids=ids, labels=ids).loss / len(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            after = flat(model)
            made.append(encode(before, after, DType.BF16, threads=threads))
            before = after
        del model, optimizer
        for i, (index, data) in enumerate(made):
            after = first.copy()
            apply(after, index, data, DType.BF16, threads=threads)
            if i in (0, steps // 2, steps - 1):
                yield f"{'warm' if warm else 'cold'} {rate:g} #{i + 1}", first, after
            first = after


def trained(folder: Path) -> Iterator[tuple[str, Words, Words]]:
    """AdamW steps of a causal language model on its own samples, 60 steps warm."""
    import torch
    from transformers import AutoModelForCausalLM

    for rate, steps in ((1e-6, 1), (1e-5, 1), (1e-4, 1), (1e-4, 30), (1e-3, 1)):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        between_roundings(model)
        with torch.no_grad():
            texts = model.generate(torch.full((64, 1), 1), max_new_tokens=64, do_sample=True, pad_token_id=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        for i in range(60 + steps):
            if i == 60:
                old = flat(model)
            batch = texts[torch.randint(len(texts), (4,))]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        yield f"AdamW {rate:g}" + f" x{steps}" * (steps > 1), old, flat(model)


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact updates against other wires.")
    parser.add_argument("--weights", type=int, default=5 << 20)
    parser.add_argument("--model", type=Path, help="A small causal model: real AdamW updates of it, too.")
    parser.add_argument("--sequence", type=Path, help="A causal model: consecutive AdamW updates of it, too.")
    parser.add_argument("--text", type=Path, help="The text of --sequence: JSON lines with the key `text`.")
    parser.add_argument("--steps", type=int, default=8, help="The number of steps of a sequence.")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    print("bytes a changed weight | GB of weights a second, decoded and applied | encode")
    updates = [drawn(given.weights)] if given.weights else []
    if given.model:
        updates.append(trained(given.model))
    if given.sequence:
        updates.append(sequence(given.sequence, given.text, given.steps, given.threads))
    for label, old, new in itertools.chain(*updates):
        changed = int(np.count_nonzero(old != new))
        cells, speeds = [f"bound {bound(old, new) / changed:.2f}"], []
        for wire in (*ours(old, new, given.threads), *wires(old, new)):
            weights = old.copy()
            wire.apply(weights)
            assert np.array_equal(weights, new), wire.name
            cells.append(f"{wire.name} {wire.size / changed:.2f}")
            speeds.append(f"{wire.name} {best(wire.apply, old, threads=given.threads):.3g}")
        pace = best(lambda w: encode(w, new, DType.BF16, threads=given.threads), old, repeats=2, threads=given.threads)  # noqa: B023
        share = f"{changed / old.size:.2%}"
        print(f"{label:14} {share:>7}  {'  '.join(cells)} | {'  '.join(speeds)} | {pace:.2f}", flush=True)


if __name__ == "__main__":
    main()
