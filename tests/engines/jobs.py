"""Jobs on the real vLLM. One process imports it, and each job runs in its own fork, because an engine needs a process.

python -m tests.engines.jobs JOBS.json      [{"job": name, "result": path, ...}, ...]; results are written as JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["PROMPTS", "run_jobs"]

# Prompts of several lengths. Two of them share a prefix that is longer than a block of the cache.
_LONG = [(7 * i) % 400 + 20 for i in range(150)]
PROMPTS: list[list[int]] = [[1, 40, 50, 60, 70], [1, 300], _LONG, [*_LONG, 33, 34], [1, *range(100, 160)]]

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

ENGINE: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "disable_log_stats": True,
    "seed": 0,
}

WORKER = "peraxis_format.engines.vllm.worker.PeraxisWorker"


def run_jobs(jobs: Sequence[dict[str, Any]], folder: Path, **environment: str) -> list[Any]:
    """Run jobs in order in another process. Raises AssertionError with its output if a job fails.

    environment: variables that override those of ENVIRONMENT.
    """
    for i, job in enumerate(jobs):
        job["result"] = str(folder / f"result-{i}.json")
    (folder / "jobs.json").write_text(json.dumps(list(jobs)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.engines.jobs", str(folder / "jobs.json")],
        env={**os.environ, **ENVIRONMENT, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads(Path(job["result"]).read_text()) for job in jobs]


def make_engine(model: str, **options: Any) -> Any:
    from vllm import LLM

    return LLM(model, **{**ENGINE, **options})


def generate(llm: Any, *, variants: Sequence[str | None] = (), paths: dict[str, str] | None = None) -> Any:
    """Return [tokens, log-probabilities with the prompt's] of each prompt. variants: one per prompt, in one batch."""
    from vllm import SamplingParams, TokensPrompt

    requests = _requests(variants, paths or {})
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in PROMPTS]
    outputs = llm.generate(prompts, params, use_tqdm=False, **({"lora_request": requests} if any(requests) else {}))
    return [_output(output) for output in outputs]


def _requests(variants: Sequence[str | None], paths: dict[str, str]) -> list[Any]:
    from vllm.lora.request import LoRARequest

    names = sorted(paths)
    return [None if name is None else LoRARequest(name, names.index(name) + 1, paths[name]) for name in variants]


def _from_cache(llm: Any) -> list[int]:
    """Return the tokens after the long prompt. Without prompt log-probabilities vLLM uses the prefix cache."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    (output,) = llm.generate(TokensPrompt(prompt_token_ids=_LONG), params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def _output(output: Any) -> Any:
    best = output.outputs[0]
    own = [step[token].logprob for step, token in zip(best.logprobs, best.token_ids, strict=True)]
    prompt = [
        step[token].logprob for step, token in zip(output.prompt_logprobs, output.prompt_token_ids, strict=True) if step
    ]
    return [list(best.token_ids), own, prompt]


# --- jobs ------------------------------------------------------------------------------------------------


def job_plain(*, model: str, **options: Any) -> Any:
    """Run a stock engine on a folder."""
    return generate(make_engine(model, **options))


def job_swaps(
    *,
    model: str,
    sequence: Sequence[str | None],
    bad: Sequence[str] = (),
    bad_first: Sequence[str] = (),
    **options: Any,
) -> Any:
    """Run an engine on the base. Returns outputs and weight version after each swap, and errors before and after."""
    from peraxis_format.engines.vllm import use

    llm = make_engine(model, load_format="peraxis", weight_transfer_config={"backend": "peraxis"}, **options)
    first = [_refusal(llm, delta) for delta in bad_first]
    found = []
    for delta in sequence:
        version = use(llm, delta)
        cached = _from_cache(llm)  # before another request can fill the cache with this variant's blocks
        found.append([version, llm.get_weight_version(), generate(llm), cached])
    errors = [_refusal(llm, delta) for delta in bad]
    again = use(llm, sequence[-1])  # the reply to this call, not to an earlier one that failed
    return {"swaps": found, "first": first, "errors": errors, "again": again, "after": generate(llm)}


def job_updates(*, model: str, updates: Sequence[str], bad: Sequence[str], delta: str, **options: Any) -> Any:
    """Run an engine on the base. Returns its outputs after each exact update, the errors, and a variant's outputs."""
    from peraxis_format.engines.vllm import remove, update, use

    llm = make_engine(model, load_format="peraxis", weight_transfer_config={"backend": "peraxis"}, **options)
    use(llm, delta)
    first = _refusal(llm, updates[0], update)
    use(llm, None)
    remove(llm, delta)
    found = [[update(llm, path), llm.get_weight_version(), generate(llm), _from_cache(llm)] for path in updates]
    errors = [_refusal(llm, path, update) for path in bad]
    return {
        "updates": found,
        "errors": [first, *errors, _refusal(llm, delta)],
        "version": use(llm, None),
        "after": generate(llm),
    }


def _refusal(llm: Any, delta: str, action: Callable[[Any, str], Any] | None = None) -> str | None:
    """Return the error of a swap or of another action, or None."""
    from peraxis_format.engines.vllm import use

    try:
        (action or use)(llm, delta)
    except Exception as error:
        return str(error)
    return None


def job_variants(
    *,
    model: str,
    paths: dict[str, str],
    batches: Sequence[Sequence[str | None]],
    bad: Sequence[str] = (),
    loads: int = 0,
    **options: Any,
) -> Any:
    """Run an engine that serves variants. Returns the outputs of each batch, counters, and errors of bad adapters.

    loads: the number of adapters that are loaded, with room for four open files, before the last batch.
    """
    from vllm.lora.request import LoRARequest

    llm = make_engine(model, worker_cls=WORKER, enable_lora=True, **{"max_loras": 4, "max_cpu_loras": 4, **options})
    found = [generate(llm, variants=names, paths=paths) for names in batches]
    errors = []
    for i, path in enumerate(bad):
        try:
            llm.llm_engine.add_lora(LoRARequest(f"bad{i}", 100 + i, path))
            errors.append(None)
        except Exception as error:
            errors.append(str(error))
    descriptors = [_few_files(llm, 4), *(_loaded(llm, 200 + i, paths) for i in range(loads))] if loads else []
    store = None
    if options.get("tensor_parallel_size", 1) == 1:
        (store,) = llm.collective_rpc(_store)
    after = generate(llm, variants=batches[0], paths=paths)
    again = llm.llm_engine.add_lora(LoRARequest("again", 99, next(iter(paths.values()))))
    return {
        "batches": found,
        "errors": errors,
        "store": store,
        "after": after,
        "again": again,
        "descriptors": descriptors,
    }


def job_failing(
    *,
    model: str,
    paths: dict[str, str],
    batches: Sequence[Sequence[str | None]],
    fails: str,
    last: Sequence[str | None],
    **options: Any,
) -> Any:
    """Run an engine whose batches evict a variant at the end, and `last` while its file is truncated, and repaired.

    Returns the module of the model runner, the outputs of the batches, counters, and the ends of the last ones.
    """
    llm = make_engine(model, worker_cls=WORKER, enable_lora=True, **options)
    (runner,) = llm.collective_rpc(_runner)
    found = [generate(llm, variants=names, paths=paths) for names in batches]
    (store,) = llm.collective_rpc(_store)
    good = Path(paths[fails]).read_bytes()
    ends = []
    for data in (good[: len(good) // 2], good):
        Path(paths[fails]).write_bytes(data)
        ends.append(_ends(llm, last, paths))
    return {"runner": runner, "batches": found, "store": store, "failed": ends[0], "repaired": ends[1]}


def _runner(worker: Any) -> str:
    """Return the module of the model runner's class, or of the GPU's, from which the CPU's is derived."""
    names = [kind.__module__ for kind in type(worker.model_runner).__mro__ if kind.__name__ == "GPUModelRunner"]
    return names[0]


def _ends(llm: Any, variants: Sequence[str | None], paths: dict[str, str]) -> Any:
    """Return [finish reason, tokens] of each prompt. variants: one per prompt, in one batch."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in PROMPTS]
    outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=_requests(variants, paths))
    return [[output.outputs[0].finish_reason, list(output.outputs[0].token_ids)] for output in outputs]


def _few_files(llm: Any, most: int) -> int:
    """Let the engine keep this many files of variants. Returns the number of descriptors of the process."""

    def set_most(worker: Any) -> None:
        worker.model_runner.lora_manager.store.files = most

    llm.collective_rpc(set_most)
    return len(os.listdir("/dev/fd"))


def _loaded(llm: Any, number: int, paths: dict[str, str]) -> int:
    """Load another adapter, as vLLM's server does after it forgot one. Returns the number of descriptors."""
    from vllm.lora.request import LoRARequest

    llm.llm_engine.add_lora(LoRARequest(f"load{number}", number, paths[max(paths)]))
    return len(os.listdir("/dev/fd"))


def _store(worker: Any) -> dict[str, Any]:
    store = worker.model_runner.lora_manager.store
    sizes = {variant.name: variant.nbytes for variant in store._host.values()}
    weights = sum({p.data_ptr(): p.nbytes for p in store.model.parameters()}.values())
    return {"reads": store.counters.reads, "evictions": store.counters.evictions, "bytes": sizes, "weights": weights}


def _function(name: str) -> Any:
    """Return a job of this file by its name, or of another module as `module:function`."""
    module, _, function = name.partition(":")
    return getattr(import_module(module), function) if function else globals()[f"job_{name}"]


def _interpret_triton() -> None:
    """Let vLLM for CPUs find a Triton: its interpreter. Model Runner V2 needs one."""
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    import_module("vllm.triton_utils")
    del backends["cpu"]  # torch's compiler would use it


def main(path: str) -> int:
    """Run each job in a fork. Returns the exit code."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        _interpret_triton()
    import vllm

    del vllm
    for job in json.loads(Path(path).read_text()):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                name, result = job.pop("job"), job.pop("result")
                found = _function(name)(**job)
                Path(result).write_text(json.dumps(found))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, code = os.waitpid(child, 0)
        if code:
            print(f"job failed: {job}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
