"""The memory of many variants in one vLLM, against the base model: measured, and by arithmetic.

    python -m benchmarks.vllm_memory
    python -m benchmarks.vllm_memory --pair BASE FINE_TUNED
    python -m benchmarks.vllm_memory --pair BASE FINE_TUNED --delta legal.pxd          the same file in all places

An engine loads one variant, answers, loads the others, and answers with all of them in one batch. Measured are the
bytes that the process holds besides files (RssAnon of Linux), so what allocators keep counts too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.vllm_inputs import add_arguments, make_inputs
from tests.engines.jobs import WORKER, make_engine, run_jobs

__all__ = ["main"]


def job_memory(*, model: str, deltas: Sequence[str]) -> dict[str, Any]:
    """Bytes: of the weights, of each variant, and of the process with one variant, with all, and after their batch."""
    from vllm.lora.request import LoRARequest

    count = len(deltas)
    llm = make_engine(model, worker_cls=WORKER, enable_lora=True, max_loras=count, max_cpu_loras=count)
    requests = [LoRARequest(f"v{i}", i, path) for i, path in enumerate(deltas, 1)]
    llm.llm_engine.add_lora(requests[0])
    _answer(llm, requests[:1])
    one = _anonymous_bytes()
    for request in requests[1:]:
        llm.llm_engine.add_lora(request)
    every = _anonymous_bytes()
    _answer(llm, requests)
    (held,) = llm.collective_rpc(_held)
    return {**held, "one": one, "every": every, "answered": _anonymous_bytes()}


def _answer(llm: Any, requests: Sequence[Any]) -> None:
    """Let each variant and the base answer a prompt of its own, in one batch."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    prompts = [TokensPrompt(prompt_token_ids=[1, *range(20 + i, 40 + i)]) for i in range(len(requests) + 1)]
    llm.generate(prompts, params, use_tqdm=False, lora_request=[*requests, None])


def _held(worker: Any) -> dict[str, Any]:
    store = worker.model_runner.lora_manager.store
    weights = sum({p.data_ptr(): p.nbytes for p in store.model.parameters()}.values())
    return {"weights": weights, "variants": [variant.nbytes for variant in store._host.values()]}


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


def report(found: dict[str, Any], files: Sequence[int]) -> str:
    """The lines to print. files: the sizes of the .pxd files, in bytes."""
    weights, variants = found["weights"], found["variants"]
    count = len(variants)
    measured = (found["every"] - found["one"]) * count / (count - 1)
    in_batch = found["answered"] - found["every"]

    def times(more: float) -> str:
        return f"{1 + more / weights:.2f} times the base"

    return (
        f"base {weights / 1e6:.1f} MB; {count} variants of {sum(files) / count / 1e6:.2f} MB as files and "
        f"{sum(variants) / count / 1e6:.2f} MB in memory\n"
        f"base and {count} files: {times(sum(files))}\n"
        f"base and {count} variants, by their tensors: {times(sum(variants))}\n"
        f"base and {count} variants, measured: {times(measured)} ({measured / count / 1e6:.2f} MB each); "
        f"a batch of all then takes {in_batch / 1e6:+.0f} MB"
    )


def main() -> int:
    """Make the variants, run the job, print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser, hidden=512, layers=6, vocabulary=8192)
    parser.add_argument("--variants", type=int, default=16, help="at least 2")
    parser.add_argument("--delta", type=Path, help="a .pxd of --pair's base, in the place of all variants")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.variants < 2:
        parser.error("--variants has to be at least 2, because the growth from one to all is measured")
    if options.delta is not None and options.pair is None:
        parser.error("--delta needs --pair, for its base")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = 0 if options.delta is not None else options.variants
        inputs = make_inputs(options, folder, variants=made, applied=0)
        paths = list(inputs.deltas.values()) or [str(options.delta.resolve())] * options.variants
        job = {"job": "benchmarks.vllm_memory:job_memory", "model": inputs.base, "deltas": paths}
        (found,) = run_jobs([job], folder)
        print(report(found, [Path(path).stat().st_size for path in paths]))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
