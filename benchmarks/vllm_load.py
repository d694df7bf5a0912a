"""Test vLLM under load: swaps during a stream of requests, and many variants and the base in one batch.

    python -m benchmarks.vllm_load --json load.json

The pair is the small random one of the tests, and requests go over HTTP. Every answer is compared with the tokens of a
stock vLLM that serves the applied folder. The exit code is 1 after a wrong token, a lost request or growing memory.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.engines.jobs import PROMPTS, WORKER, run_jobs
from tests.engines.pair import make_pair
from tests.engines.server import Server, family_of, serve, together

__all__ = ["main"]

STREAMS = 4
GROWTH = 32 << 20  # growth of resident memory that counts as noise, in bytes


def memory_of(server: Server) -> int:
    """Return the resident bytes of all processes of a server."""
    pages = 0
    for process in family_of(server):
        try:
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * 4096


def swaps_under_load(paths: dict[str, str], tokens: dict[str, list[list[int]]], folder: Path, swaps: int) -> Any:
    """Swap `swaps` times between the base and two variants during streams of requests. Returns the figures."""
    arguments = ("--load-format", "peraxis", "--weight-transfer-config", '{"backend": "peraxis"}')
    names: list[str | None] = ["v1", "v2", None]
    environment = {"VLLM_PLUGINS": "peraxis"}
    with serve(paths["base"], *arguments, log=folder / "swaps.log", environment=environment) as server:
        for name in ("v1", "v2"):
            server.post("/v1/peraxis/variants", {"name": name, "delta": paths[f"{name}.pxd"]})
        stop = threading.Event()
        answers: list[tuple[int, list[int]]] = []

        def stream(first: int) -> Callable[[], int]:
            def run() -> int:
                sent = 0
                while not stop.is_set():
                    prompt = (first + sent) % len(PROMPTS)
                    sent += 1
                    answers.append((prompt, server.complete("base", PROMPTS[prompt])[0]))
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
    possible = [[tokens[name or "base"][i] for name in names] for i in range(len(PROMPTS))]
    wrong = sum(answer not in possible[prompt] for prompt, answer in answers)
    late = memory[len(memory) // 2 :]  # allocators and compilers have warmed up by then
    growth = statistics.median(late[len(late) // 2 :]) - statistics.median(late[: len(late) // 2])
    return {
        "swaps": len(paused),
        "requests": sum(sent),
        "lost": sum(sent) - len(answers),
        "wrong": wrong,
        "paused_ms": 1000 * statistics.median(paused),
        "memory": memory[-1],
        "growth": growth,
    }


def variants_under_load(
    paths: dict[str, str], tokens: dict[str, list[list[int]]], folder: Path, *, flight: int, rounds: int
) -> Any:
    """Send `rounds` batches of `flight` requests over all variants and the base, in exact mode. Returns the figures."""
    variants = sorted(name for name in tokens if name != "base")
    modules = [f"{name}={paths[f'{name}.pxd']}" for name in variants]
    count = str(len(variants))
    arguments = (
        *("--worker-cls", WORKER, "--enable-lora", "--max-loras", count, "--max-cpu-loras", count),
        *("--additional-config", '{"peraxis": {"exact": true}}', "--lora-modules", *modules),
        *("--max-num-seqs", str(flight)),
    )
    asked = [(name, i) for i in range(len(PROMPTS)) for name in (*variants, "base")]
    order = random.Random(0)
    with serve(paths["base"], *arguments, log=folder / "variants.log") as server:

        def call(name: str, i: int) -> Callable[[], list[int]]:
            return lambda: server.complete(name, PROMPTS[i])[0]

        wrong = requests = 0
        began = time.monotonic()
        for _ in range(rounds):
            chosen = [order.choice(asked) for _ in range(flight)]
            found = together([call(name, i) for name, i in chosen])
            requests += len(found)
            wrong += sum(own != tokens[name][i] for own, (name, i) in zip(found, chosen, strict=True))
        seconds = time.monotonic() - began
    return {"variants": len(variants), "in_flight": flight, "requests": requests, "wrong": wrong, "seconds": seconds}


def main() -> int:
    """Run both parts and print the figures. Returns 1 if a token is wrong, a request is lost or memory grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--variants", type=int, default=16)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make_pair(folder, tied=False, seeds=range(1, options.variants + 1))
        names = ["base", *(f"v{i}" for i in range(1, options.variants + 1))]
        outputs = run_jobs([{"job": "plain", "model": paths[name]} for name in names], folder)
        tokens = {name: [output[0] for output in found] for name, found in zip(names, outputs, strict=True)}
        swaps = swaps_under_load(paths, tokens, folder, options.swaps)
        print(
            f"{swaps['swaps']} swaps under {STREAMS} streams, {swaps['requests']} requests: {swaps['wrong']} wrong, "
            f"{swaps['lost']} lost; a pause of {swaps['paused_ms']:.0f} ms; "
            f"memory {swaps['memory'] / 1e6:.0f} MB, {swaps['growth'] / 1e6:+.1f} MB over the last half"
        )
        batch = variants_under_load(paths, tokens, folder, flight=options.in_flight, rounds=options.rounds)
        print(
            f"{batch['requests']} requests, {batch['in_flight']} in flight over {batch['variants']} variants and the "
            f"base: {batch['wrong']} wrong, {batch['seconds']:.1f} s"
        )
    if options.json is not None:
        options.json.write_text(json.dumps({"swaps": swaps, "variants": batch}, indent=2))
    return 1 if swaps["wrong"] or swaps["lost"] or swaps["growth"] > GROWTH or batch["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
