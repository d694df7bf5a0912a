"""A swap in vLLM, against its own reload and against a restart, in one engine and in turn.

    python -m benchmarks.vllm_engine --json vllm.json                      (`make bench-vllm`; not named vllm.py, which
    python -m benchmarks.vllm_engine --pair BASE FINE_TUNED                 would be imported in the place of vLLM)

Each round times a swap to the fine-tune, a swap to the base, and `reload_weights` of the folder that `apply` writes. So
other work on the machine takes from all of them, and the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.vllm_inputs import add_arguments, make_inputs
from peraxis_format.thread_pool import thread_count
from tests.engines.jobs import make_engine, run_jobs

__all__ = ["main"]


def job_swap_times(*, model: str, delta: str, applied: str, repeat: int) -> dict[str, Any]:
    """Seconds of each round, of the first swap, of its staging, and of the engine's start without the imports."""
    from peraxis_format.engines.vllm import use

    llm, start = _timed(
        lambda: make_engine(model, load_format="peraxis", weight_transfer_config={"backend": "peraxis"})
    )
    _, stage = _timed(lambda: llm.collective_rpc("init_weight_transfer_engine", args=({"add": {delta: delta}},)))
    _, first = _timed(lambda: llm.collective_rpc(_write, args=(delta,)))
    llm.collective_rpc(_remove, args=(delta,))
    use(llm, delta)
    rounds: list[dict[str, float]] = []
    for _ in range(repeat):
        _, to_base = _timed(lambda: use(llm, None))
        _, swap = _timed(lambda: use(llm, delta))
        (rebuild,) = llm.collective_rpc(_rebuild, args=(delta,))
        use(llm, None)
        _, reload = _timed(lambda: llm.collective_rpc("reload_weights", kwargs={"weights_path": applied}))
        llm.collective_rpc(_discard)
        rounds.append({"swap": swap, "to base": to_base, "reload": reload, "rebuild": rebuild})
    return {"start": start, "stage": stage, "first": first, "rounds": rounds}


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    found = action()
    return found, time.perf_counter() - began


# --- in the worker ---------------------------------------------------------------------------------------


def _write(worker: Any, name: str | None) -> None:
    worker.weight_transfer_engine._live.use(name)


def _remove(worker: Any, name: str) -> None:
    _write(worker, None)
    worker.weight_transfer_engine._live.remove(name)


def _rebuild(worker: Any, name: str) -> float:
    """Seconds in which a swap writes the weights."""
    switch = worker.weight_transfer_engine._live._switch
    switch.use(None)
    return float(switch.use(name).seconds)


def _discard(worker: Any) -> None:
    """Return to the base after reload_weights has written the weights."""
    worker.weight_transfer_engine._live._switch.use(None, overwrite=True)


# --- the report ------------------------------------------------------------------------------------------


def _report(found: dict[str, Any], delta: Path, weights: int) -> None:
    rounds = found["rounds"]
    median = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    ratio = statistics.median(each["reload"] / each["swap"] for each in rounds)
    ms = {name: f"{1000 * seconds:.0f} ms" for name, seconds in median.items()}
    print(f"swap {ms['swap']} (its weights {ms['rebuild']}), to base {ms['to base']}")
    print(f"staging {1000 * found['stage']:.0f} ms, the first swap {1000 * found['first']:.0f} ms")
    print(f"reload_weights {ms['reload']}: {ratio:.1f} times a swap (median of {len(rounds)} rounds)")
    print(f"start of an engine without imports {found['start']:.1f} s: {found['start'] / median['swap']:.0f} times")
    size = delta.stat().st_size
    print(f"weights {weights / 1e6:.0f} MB, a variant {size / 1e6:.1f} MB; base and 16: {1 + 16 * size / weights:.2f}")


def main() -> int:
    """Make the pair, run the job, print and write what it found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser, hidden=512, layers=6, vocabulary=8192)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--threads", type=int, default=thread_count())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = make_inputs(options, folder, variants=1, applied=1)
        (delta,), (applied,) = inputs.deltas.values(), inputs.applied.values()
        job = {"model": inputs.base, "delta": delta, "applied": applied, "repeat": options.repeat}
        (found,) = run_jobs(
            [{"job": "benchmarks.vllm_engine:job_swap_times", **job}], folder, OMP_NUM_THREADS=str(options.threads)
        )
        weights = sum(path.stat().st_size for path in Path(applied).glob("*.safetensors"))
        _report(found, Path(delta), weights)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
