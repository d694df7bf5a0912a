"""Time a swap in vLLM beside vLLM's reload and restart, and batches with 1, 4 and 16 variants.

    python -m benchmarks.vllm_engine --json vllm.json          (`make bench-vllm`)

The pair is random with the given sizes; the figures do not depend on its outputs. All figures come from one run on one
machine. The weights are on the CPU or GPU that vLLM uses. This module is not named vllm.py, because it would be
imported in the place of vLLM.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peraxis_format.thread_pool import thread_count
from tests.engines.jobs import WORKER, make_engine, run_jobs
from tests.engines.pair import make_base, make_delta

__all__ = ["main"]

VARIANTS = 16
REQUESTS = 16
TOKENS = 24


def job_swap_times(*, model: str, delta: str, applied: str, repeat: int) -> dict[str, Any]:
    """Return the shortest times in seconds, all in one engine.

    The shortest time is the one least disturbed by other processes. `start` is the start of the engine without imports.
    """
    from peraxis_format.engines.vllm import use

    started = time.perf_counter()
    llm = make_engine(model, load_format="peraxis", weight_transfer_config={"backend": "peraxis"})
    start = time.perf_counter() - started
    use(llm, delta)
    times: dict[str, list[float]] = {"swap": [], "to base": [], "reload_weights": []}
    for _ in range(repeat):
        for name, target in (("to base", None), ("swap", delta)):
            began = time.perf_counter()
            use(llm, target)
            times[name].append(time.perf_counter() - began)
    use(llm, None)
    for _ in range(repeat):
        began = time.perf_counter()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": applied})
        times["reload_weights"].append(time.perf_counter() - began)
    return {"start": start, **{name: min(each) for name, each in times.items()}}


def job_batch_times(*, model: str, deltas: list[str]) -> list[dict[str, Any]]:
    """Return the seconds of REQUESTS requests of TOKENS tokens, on the base and spread over 1, 4 and 16 variants."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    counts = [count for count in (0, 1, 4, 16) if count <= len(deltas)]
    llm = make_engine(model, worker_cls=WORKER, enable_lora=True, max_loras=len(deltas), max_cpu_loras=len(deltas))
    found = []
    first = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    many = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    prompts = [TokensPrompt(prompt_token_ids=[1, *range(10 + i, 40 + i)]) for i in range(REQUESTS)]
    for count in counts:
        variants = [LoRARequest(f"v{i}", 1 + i, deltas[i]) for i in range(count)]
        options = {"lora_request": [variants[i % count] for i in range(REQUESTS)]} if count else {}
        llm.generate(prompts, first, use_tqdm=False, **options)  # loads the variants, compiles
        seconds = []
        for parameters in (first, many):
            llm.reset_prefix_cache()
            began = time.perf_counter()
            llm.generate(prompts, parameters, use_tqdm=False, **options)
            seconds.append(time.perf_counter() - began)
        found.append({"variants": count, "first_tokens": seconds[0], "all_tokens": seconds[1]})
    (sizes,) = llm.collective_rpc(_sizes)
    return [{**each, **sizes} for each in found]


def _sizes(worker: Any) -> dict[str, int]:
    store = worker.model_runner.lora_manager.store
    variants = [store.get(number) for number in store.ids()]
    weights = {p.data_ptr(): p.nbytes for p in store.model.parameters()}
    return {"variant_bytes": sum(v.nbytes for v in variants) // len(variants), "weight_bytes": sum(weights.values())}


def _report(swap: dict[str, float], batches: list[dict[str, Any]]) -> None:
    print(f"swap {swap['swap']:.3f} s, to the base {swap['to base']:.3f} s")
    print(f"reload_weights {swap['reload_weights']:.3f} s, start of an engine without imports {swap['start']:.1f} s")
    ratio = swap["reload_weights"] / swap["swap"]
    print(f"a swap is {ratio:.1f} times faster than reload_weights, {swap['start'] / swap['swap']:.0f} than a start")
    for each in batches:
        rate = REQUESTS * TOKENS / each["all_tokens"]
        print(f"{each['variants']:3} variants: {rate:7.1f} tokens/s, first tokens {each['first_tokens']:.2f} s")
    one, weights = batches[0]["variant_bytes"], batches[0]["weight_bytes"]
    print(f"weights {weights / 1e6:.1f} MB, a variant {one / 1e6:.1f} MB")
    print(f"base and {VARIANTS} variants: {1 + VARIANTS * one / weights:.2f} times the base")


def main() -> int:
    """Make the pair, run both jobs, and print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = {
        "hidden_size": options.hidden,
        "intermediate_size": 3 * options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": options.hidden // 128,
        "vocab_size": options.vocabulary,
    }
    import peraxis_tools

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(folder / "base", tied=False, **sizes)
        deltas = [str(make_delta(folder / f"v{i}.pxd", base, seed=i, masks=1)) for i in range(VARIANTS)]
        peraxis_tools.apply(base, deltas[0], folder / "v0")
        swap, batches = run_jobs(
            [
                {
                    "job": "benchmarks.vllm_engine:job_swap_times",
                    "model": str(base),
                    "delta": deltas[0],
                    "applied": str(folder / "v0"),
                    "repeat": options.repeat,
                },
                {"job": "benchmarks.vllm_engine:job_batch_times", "model": str(base), "deltas": deltas},
            ],
            folder,
            OMP_NUM_THREADS=str(thread_count()),
        )
    _report(swap, batches)
    if options.json is not None:
        options.json.write_text(json.dumps({"sizes": sizes, "swap": swap, "batches": batches}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
