"""What has to hold in vLLM: bits of swaps and cold starts, swaps under a stream of requests, many variants in a batch.

    python -m benchmarks.vllm_load --json load.json
    python -m benchmarks.vllm_load --pair BASE FINE_TUNED --swaps 24 --rounds 1

Every answer is held to fresh stock engines of the applied folders, which answer all prompts in one batch, and then each
prompt alone: vLLM rounds differently for one row and for several. An answer is

    equal      tokens and log-probabilities are those of the batch, or those alone, to the bit
    rounded    both kinds of step occurred in one answer: equal up to rounding, or up to a token of the same probability
    wrong      anything else

The exit status is 1 if an answer is wrong, a request is lost, or memory grows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.vllm_inputs import Inputs, add_arguments, make_inputs
from tests.engines.jobs import PROMPTS, WORKER, generate, make_engine, run_jobs
from tests.engines.server import Server, family_of, serve, together

__all__ = ["main"]

STREAMS = 4
WORDS = ("equal", "rounded", "wrong")
GROWTH = 32 << 20  # bytes of resident memory that are noise
# oneDNN keeps a compiled kernel for each layer shape and number of rows, up to 1024: a gigabyte that would hide a leak.
FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
ROUNDING = 0.25  # of a log-probability: two steps of a logit between 16 and 32 in BF16

Output = list[Any]  # [tokens, log-probabilities, ...]
References = dict[str, dict[str, list[Output]]]  # name -> "batch", "alone" -> the output for each prompt


def job_references(*, model: str) -> dict[str, list[Output]]:
    """A stock engine's outputs for all prompts in a batch, and for each alone."""
    from vllm import SamplingParams, TokensPrompt

    llm = make_engine(model)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
    alone = []
    for tokens in PROMPTS:
        llm.reset_prefix_cache()
        (found,) = llm.generate(TokensPrompt(prompt_token_ids=tokens), params, use_tqdm=False)
        best = found.outputs[0]
        own = [step[token].logprob for step, token in zip(best.logprobs, best.token_ids, strict=True)]
        alone.append([list(best.token_ids), own])
    llm.reset_prefix_cache()
    return {"batch": generate(llm), "alone": alone}


def possible(references: References, names: Iterable[str], prompt: int) -> list[Output]:
    """The outputs that an answer to a prompt may be equal to."""
    return [found[prompt] for name in names for found in references[name].values()]


def verdict(answer: Output, outputs: Sequence[Output]) -> str:
    """The best word for an answer (see above) among these outputs of stock engines."""
    found = {_verdict(answer, output) for output in outputs}
    return next(word for word in WORDS if word in found)


def _verdict(answer: Output, output: Output) -> str:
    if answer[:2] == output[:2]:
        return "equal"
    for own, expected, own_log, expected_log in zip(answer[0], output[0], answer[1], output[1], strict=True):
        if abs(own_log - expected_log) > ROUNDING:
            return "wrong"
        if own != expected:
            break
    return "rounded"


def counted(verdicts: Iterable[str]) -> dict[str, int]:
    """The number of each verdict."""
    found = Counter(verdicts)
    return {word: found[word] for word in WORDS}


def memory_of(server: Server) -> int:
    """Return the resident bytes of all processes of a server."""
    pages = 0
    for process in family_of(server):
        try:
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * 4096


def exact_ways(inputs: Inputs, folder: Path) -> tuple[References, dict[str, bool]]:
    """The outputs of stock engines by name, and whether swaps and a cold start equal them to the bit.

    Log-probabilities are compared too, those of the prompts included.
    """
    one, two = list(inputs.deltas.values())[:2]
    cold = {"load_format": "peraxis", "model_loader_extra_config": {"delta": one}}
    stock = {"base": inputs.base, **inputs.applied}
    *outputs, swapped, started = run_jobs(
        [
            *({"job": "benchmarks.vllm_load:job_references", "model": path} for path in stock.values()),
            {"job": "swaps", "model": inputs.base, "sequence": [one, two, None, one]},
            {"job": "plain", "model": inputs.base, **cold},
        ],
        folder,
    )
    references = dict(zip(stock, outputs, strict=True))
    batch = {name: each["batch"] for name, each in references.items()}
    first, second = list(inputs.deltas)[:2]
    found = [output for _, _, output, _ in swapped["swaps"]]
    equal = {
        "swaps": found == [batch[name] for name in (first, second, "base", first)],
        "cold_start": started == batch[first],
        "all_differ": all(a != b for a, b in itertools.combinations(batch.values(), 2)),
    }
    return references, equal


def swaps_under_load(inputs: Inputs, references: References, folder: Path, swaps: int) -> dict[str, Any]:
    """Swap `swaps` times between the base and two variants while streams of requests run."""
    arguments = ("--load-format", "peraxis", "--weight-transfer-config", '{"backend": "peraxis"}')
    names: list[str | None] = ["v1", "v2", None]
    environment = {"VLLM_PLUGINS": "peraxis", **FEW_KERNELS}
    with serve(inputs.base, *arguments, log=folder / "swaps.log", environment=environment) as server:
        for name in ("v1", "v2"):
            server.post("/v1/peraxis/variants", {"name": name, "delta": inputs.deltas[name]})
        stop = threading.Event()
        answers: list[tuple[int, Output]] = []

        def stream(first: int) -> Callable[[], int]:
            def run() -> int:
                sent = 0
                while not stop.is_set():
                    prompt = (first + sent) % len(PROMPTS)
                    sent += 1
                    answers.append((prompt, server.complete("base", PROMPTS[prompt])))
                return sent

            return run

        memory: list[int] = []
        paused: list[float] = []

        def swap() -> None:
            try:
                for i in range(swaps):
                    status, answer = server.post("/v1/peraxis/use", {"variant": names[i % 3]})
                    assert status == 200, answer
                    paused.append(answer["paused_seconds"])
                    memory.append(memory_of(server))
            finally:
                stop.set()

        *sent, _ = together([*(stream(i) for i in range(STREAMS)), swap])
    known = [name or "base" for name in names]
    late = memory[len(memory) // 2 :]  # allocators and compilers have what they need by then
    growth = statistics.median(late[len(late) // 2 :]) - statistics.median(late[: len(late) // 2])
    return {
        "swaps": len(paused),
        "requests": sum(sent),
        "lost": sum(sent) - len(answers),
        **counted(verdict(answer, possible(references, known, prompt)) for prompt, answer in answers),
        "paused_ms": 1000 * statistics.median(paused),
        "first_paused_ms": 1000 * paused[0],
        "memory": memory,
        "growth": growth,
    }


def requests_under_load(
    server: Server, names: Sequence[str], references: References, *, flight: int, rounds: int
) -> dict[str, Any]:
    """`flight` requests at a time, over these models in turn; the prompts are drawn."""
    order = random.Random(0)

    def call(name: str, i: int) -> Callable[[], Output]:
        return lambda: server.complete(name, PROMPTS[i])

    verdicts: list[str] = []
    began = time.monotonic()
    for _ in range(rounds):
        chosen = [(names[i % len(names)], order.randrange(len(PROMPTS))) for i in range(flight)]
        found = together([call(name, i) for name, i in chosen])
        asked_for = (possible(references, [name], i) for name, i in chosen)
        verdicts += [verdict(own, outputs) for own, outputs in zip(found, asked_for, strict=True)]
    return {"requests": len(verdicts), "seconds": time.monotonic() - began, **counted(verdicts)}


def variants_under_load(inputs: Inputs, references: References, folder: Path, *, flight: int, rounds: int) -> Any:
    """Requests over all variants and the base, in exact mode."""
    modules = [f"{name}={path}" for name, path in inputs.deltas.items()]
    count = str(len(modules))
    arguments = (
        *("--worker-cls", WORKER, "--enable-lora", "--max-loras", count, "--max-cpu-loras", count),
        *("--additional-config", '{"peraxis": {"exact": true}}', "--lora-modules", *modules),
        *("--max-num-seqs", str(flight)),
    )
    with serve(inputs.base, *arguments, log=folder / "variants.log") as server:
        names = [*inputs.deltas, "base"]
        found = requests_under_load(server, names, references, flight=flight, rounds=rounds)
    return {"variants": len(modules), "in_flight": flight, **found}


def main() -> int:
    """Run both parts and print the figures. Returns 1 if a token is wrong, a request is lost or memory grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser, hidden=256, layers=2, vocabulary=500)
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--variants", type=int, default=16)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = make_inputs(options, folder, variants=options.variants, applied=options.variants)
        references, equal = exact_ways(inputs, folder)
        print(", ".join(f"{way}: {'yes' if holds else 'NO'}" for way, holds in equal.items()), flush=True)
        swaps = swaps_under_load(inputs, references, folder, options.swaps)
        print(
            f"{swaps['swaps']} swaps under {STREAMS} streams, {swaps['requests']} requests: {_words(swaps)}, "
            f"{swaps['lost']} lost; pauses of {swaps['paused_ms']:.0f} ms, the first {swaps['first_paused_ms']:.0f}; "
            f"memory {swaps['memory'][-1] / 1e6:.0f} MB, {swaps['growth'] / 1e6:+.1f} MB over the last half",
            flush=True,
        )
        load = {"flight": options.in_flight, "rounds": options.rounds}
        batch = variants_under_load(inputs, references, folder, **load)
        print(
            f"{batch['requests']} requests, {batch['in_flight']} in flight over {batch['variants']} variants and the "
            f"base: {_words(batch)}, {batch['seconds']:.1f} s",
            flush=True,
        )
    found = {"equal": equal, "swaps": swaps, "variants": batch}
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2))
    failed = swaps["wrong"] or swaps["lost"] or swaps["growth"] > GROWTH or batch["wrong"]
    return 1 if failed or not all(equal.values()) else 0


def _words(found: dict[str, Any]) -> str:
    return f"{found['equal']} equal, {found['rounded']} rounded, {found['wrong']} wrong"


if __name__ == "__main__":
    sys.exit(main())
