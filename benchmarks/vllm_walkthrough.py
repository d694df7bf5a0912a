"""A session with the real vLLM over HTTP: cold start, live swap, exact updates, many fine-tunes in one batch.

`make vllm` runs it, on a small random pair (heads of 64). Every answer is compared with that of a fresh stock vLLM of
the folder that `apply` writes. The exit code is 1 if a token differs, or if a followed chain does not arrive.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Final

import peraxis_tools
from tests.engines.jobs import PROMPTS, WORKER, run_jobs
from tests.engines.pair import make_chain, make_pair
from tests.engines.server import Server, serve

__all__ = ["main"]

NAMES: Final = ("base", "v1", "v2")
STATES: Final = ("step1", "step2")
FOLLOW_SECONDS: Final = 60.0


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

    def require(self, holds: bool, what: str) -> None:
        """Print a line, and count it as a difference if it does not hold."""
        self.differences += not holds
        print(what)


def swap_session(paths: dict[str, str], folder: Path, comparison: Comparison) -> None:
    """Stage two variants and swap between them."""
    arguments = ("--load-format", "peraxis", "--weight-transfer-config", '{"backend": "peraxis"}')
    print("\n$ VLLM_PLUGINS=peraxis vllm serve BASE --api-key KEY " + " ".join(arguments))
    with serve(paths["base"], *arguments, log=folder / "swap.log", environment={"VLLM_PLUGINS": "peraxis"}) as server:
        for name in NAMES[1:]:
            body = {"name": name, "delta": paths[f"{name}.pxd"]}
            print(f"POST /v1/peraxis/variants {name}: {server.post('/v1/peraxis/variants', body)}")
        for variant in ("v1", None, "v2", "v1"):
            status, answer = server.post("/v1/peraxis/use", {"variant": variant, "requests": "wait"})
            print(f"POST /v1/peraxis/use {variant}: {status}, paused {answer['paused_seconds'] * 1000:.0f} ms")
            comparison.check(f"  version {answer['weight_version'][:20]}", server, "base", variant or "base")
        leave_variants(server)
        update_session(paths, folder, server, comparison)


def leave_variants(server: Server) -> None:
    """Return to the base and remove the variants, because an exact update changes what they were made for."""
    server.post("/v1/peraxis/use", {"variant": None})
    for name in NAMES[1:]:
        print(f"DELETE /v1/peraxis/variants/{name}: {server.request('DELETE', f'/v1/peraxis/variants/{name}')[0]}")


def update_session(paths: dict[str, str], folder: Path, server: Server, comparison: Comparison) -> None:
    """Apply one exact update, then follow a folder while the next one arrives in it."""
    chain, growing = Path(paths["chain"]), folder / "growing"
    growing.mkdir()
    anchor, first, second = (chain / f"{name}.pxd" for name in ("anchor-00000000", "step-00000001", "step-00000002"))
    status, answer = server.post("/v1/peraxis/update", {"update": str(first)})
    print(f"POST /v1/peraxis/update {first.name}: {status}, paused {answer['paused_seconds'] * 1000:.0f} ms")
    comparison.check(f"  version {answer['weight_version'][:20]}", server, "base", "step1")
    for path in (anchor, first):
        shutil.copy(path, growing)
    print(f"POST /v1/peraxis/follow: {server.post('/v1/peraxis/follow', {'folder': str(growing), 'every': 0.2})}")
    comparison.check("  step 1, from the anchor", server, "base", "step1")
    shutil.copy(second, growing / "arriving")
    os.replace(growing / "arriving", growing / second.name)
    report = followed(server, step=2)
    comparison.require(report["step"] == 2, f"GET /v1/peraxis: {report}")
    comparison.check("  step 2, as it arrived", server, "base", "step2")
    print(f"DELETE /v1/peraxis/follow: {server.request('DELETE', '/v1/peraxis/follow')[0]}")


def followed(server: Server, *, step: int) -> Any:
    """What the server reports of its chain, once it is at a step or the time is over."""
    end = time.monotonic() + FOLLOW_SECONDS
    while (report := server.get("/v1/peraxis")[1]["follow"])["step"] != step and time.monotonic() < end:
        time.sleep(0.1)
    return report


def batch_session(paths: dict[str, str], folder: Path, comparison: Comparison) -> None:
    """Serve two variants beside the base, chosen by the model field."""
    modules = [f"{name}={paths[f'{name}.pxd']}" for name in NAMES[1:]]
    arguments = ("--worker-cls", WORKER, "--enable-lora", "--additional-config", '{"peraxis": {"exact": true}}')
    print("\n$ vllm serve BASE " + " ".join(arguments) + " --lora-modules v1=v1.pxd v2=v2.pxd")
    with serve(paths["base"], *arguments, "--lora-modules", *modules, log=folder / "batch.log") as server:
        print("models", [model["id"] for model in server.get("/v1/models")[1]["data"]])
        for name in NAMES:
            comparison.check(f'  "model": "{name}"', server, name, name)


def applied_chain(folder: Path, base: str) -> dict[str, str]:
    """A chain of two exact updates of a base, and the folders that `apply` writes from its first files."""
    chain = make_chain(folder / "trainer", Path(base), steps=len(STATES))["chain"]
    updates = [f"{chain}/step-{i:08}.pxd" for i, _ in enumerate(STATES, 1)]
    applied = {name: str(folder / name) for name in STATES}
    for i, name in enumerate(STATES, 1):
        peraxis_tools.apply(base, updates[:i], applied[name])
    return {"chain": chain, **applied}


def main() -> int:
    """Run the session. Returns 1 if a token differs."""
    folder = Path(".vllm-demo")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    paths = make_pair(folder, tied=False, seeds=(1, 2))
    paths |= applied_chain(folder, paths["base"])
    cold = {"load_format": "peraxis", "model_loader_extra_config": {"delta": paths["v1.pxd"]}}
    stock = (*NAMES, *STATES)
    jobs: list[dict[str, Any]] = [{"job": "plain", "model": paths[name]} for name in stock]
    *references, started = run_jobs([*jobs, {"job": "plain", "model": paths["base"], **cold}], folder)
    comparison = Comparison(dict(zip(stock, references, strict=True)))
    equal = started == references[1]
    comparison.differences += not equal
    print(f"cold start from base + v1.pxd: tokens and log-probabilities {'equal' if equal else 'DIFFER'}, to the bit")
    swap_session(paths, folder, comparison)
    batch_session(paths, folder, comparison)
    print(f"\n{comparison.differences} differences; servers' logs in {folder}")
    return 1 if comparison.differences else 0


if __name__ == "__main__":
    sys.exit(main())
