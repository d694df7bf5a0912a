"""Run a session with the real vLLM over HTTP: cold start, live swap, many fine-tunes in one batch (`make vllm`).

The pair is small and random (head size 64). Every answer is compared with that of a stock vLLM that serves the applied
folder. The exit code is 1 if a token differs.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from tests.engines.jobs import PROMPTS, WORKER, run_jobs
from tests.engines.pair import make_pair
from tests.engines.server import Server, serve

__all__ = ["main"]

NAMES = ("base", "v1", "v2")


class Comparison:
    """Counts answers that differ from the reference, and prints a line for each."""

    def __init__(self, references: dict[str, Any]) -> None:
        self.references = references
        self.differences = 0

    def check(self, what: str, server: Server, model: str, name: str) -> None:
        """Compare the tokens of a server's model with the reference `name` for every prompt."""
        found = [server.complete(model, prompt) for prompt in PROMPTS]
        expected = self.references[name]
        same = sum(own[0] == reference[0] for own, reference in zip(found, expected, strict=True))
        self.differences += len(PROMPTS) - same
        print(f"{what:34} {same} of {len(PROMPTS)} prompts have the tokens of a stock vLLM with {name}")


def swap_session(paths: dict[str, str], folder: Path, comparison: Comparison) -> None:
    """Stage two variants and swap between them."""
    arguments = ("--load-format", "peraxis", "--weight-transfer-config", '{"backend": "peraxis"}')
    print("\n$ VLLM_PLUGINS=peraxis vllm serve BASE " + " ".join(arguments))
    with serve(paths["base"], *arguments, log=folder / "swap.log", environment={"VLLM_PLUGINS": "peraxis"}) as server:
        for name in NAMES[1:]:
            body = {"name": name, "delta": paths[f"{name}.pxd"]}
            print(f"POST /v1/peraxis/variants {name}: {server.post('/v1/peraxis/variants', body)}")
        for name in ("v1", None, "v2", "v1"):
            status, answer = server.post("/v1/peraxis/use", {"variant": name, "requests": "wait"})
            print(f"POST /v1/peraxis/use {name}: {status}, paused {answer['paused_seconds'] * 1000:.0f} ms")
            comparison.check(f"  version {answer['weight_version'][:20]}", server, "base", name or "base")


def batch_session(paths: dict[str, str], folder: Path, comparison: Comparison) -> None:
    """Serve two variants beside the base, chosen by the model field."""
    modules = [f"{name}={paths[f'{name}.pxd']}" for name in NAMES[1:]]
    arguments = ("--worker-cls", WORKER, "--enable-lora", "--additional-config", '{"peraxis": {"exact": true}}')
    print("\n$ vllm serve BASE " + " ".join(arguments) + " --lora-modules v1=v1.pxd v2=v2.pxd")
    with serve(paths["base"], *arguments, "--lora-modules", *modules, log=folder / "batch.log") as server:
        print("models", [model["id"] for model in server.get("/v1/models")[1]["data"]])
        for name in NAMES:
            comparison.check(f'  "model": "{name}"', server, name, name)


def main() -> int:
    """Run the session. Returns 1 if a token differs."""
    folder = Path(".vllm-demo")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    paths = make_pair(folder, tied=False, seeds=(1, 2))
    cold = {"load_format": "peraxis", "model_loader_extra_config": {"delta": paths["v1.pxd"]}}
    jobs: list[dict[str, Any]] = [{"job": "plain", "model": paths[name]} for name in NAMES]
    *references, started = run_jobs([*jobs, {"job": "plain", "model": paths["base"], **cold}], folder)
    comparison = Comparison(dict(zip(NAMES, references, strict=True)))
    equal = started == references[1]
    comparison.differences += not equal
    print(f"cold start from base + v1.pxd: tokens and log-probabilities {'equal' if equal else 'DIFFER'}, to the bit")
    swap_session(paths, folder, comparison)
    batch_session(paths, folder, comparison)
    print(f"\n{comparison.differences} differences; servers' logs in {folder}")
    return 1 if comparison.differences else 0


if __name__ == "__main__":
    sys.exit(main())
