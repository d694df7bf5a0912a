"""1, 4 and 16 fine-tunes served three ways by real servers: requests a second, time to first token, memory.

    one batch     one server; the `model` field of each request chooses the variant
    swaps         one server; requests are sorted by variant, and it is swapped between their batches
    servers       one stock vLLM for each variant, of the folder that `apply` writes, all at the same time

    python -m benchmarks.vllm_serving --json serving.json
    python -m benchmarks.vllm_serving --pair BASE FINE_TUNED

All requests of a measurement arrive at once and are streamed. The time to first token is each request's own, from the
arrival to the first event of its stream. Memory is the proportional set size (Linux) of all processes of the servers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks.vllm_inputs import Inputs, add_arguments, make_inputs
from tests.engines.jobs import WORKER
from tests.engines.server import Server, family_of, serve, together

__all__ = ["main"]

COUNTS: Final = (1, 4, 16)
PROMPT: Final = 32  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One measurement. first: seconds to first token, of each request. memory: bytes."""

    way: str
    variants: int
    seconds: float
    first: tuple[float, ...]
    memory: int

    def row(self, rounds: Sequence[Timed]) -> str:
        """A row of the table; rounds: the repetitions of this measurement."""
        rate = statistics.median(len(each.first) / each.seconds for each in rounds)
        first = sorted(second for each in rounds for second in each.first)
        late = first[math.ceil(0.95 * len(first)) - 1]
        return (
            f"| {self.way} | {self.variants} | {rate:.1f} | {statistics.median(first):.2f} s | {late:.2f} s "
            f"| {max(each.memory for each in rounds) / 1e6:.0f} MB |"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """server, model: where it goes. number: makes its prompt differ from all others."""

    server: Server
    model: str
    number: int
    tokens: int

    def run(self, arrival: float) -> float:
        """Stream the answer to its end. Returns the seconds from the arrival to its first event."""
        prompt = [1, *((7 * self.number + 3 * i) % 300 + 20 for i in range(PROMPT - 1))]
        body = {"model": self.model, "prompt": prompt, "max_tokens": self.tokens, "temperature": 0, "ignore_eos": True}
        events = self.server.stream("/v1/completions", body | {"return_token_ids": True})
        answered = len(next(events)["choices"][0]["token_ids"])
        first = time.perf_counter() - arrival
        answered += sum(len(event["choices"][0]["token_ids"]) for event in events)
        assert answered == self.tokens, f"{answered} of {self.tokens} tokens"
        return first


def memory_of(servers: Iterable[Server]) -> int:
    """The proportional set size of all processes of these servers, in bytes."""
    total = 0
    for process in (process for server in servers for process in family_of(server)):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def burst(requests: Sequence[Request], arrival: float) -> list[float]:
    """Send requests at once, and wait for all. Returns the seconds of each from the arrival to its first token."""

    def call(request: Request) -> Callable[[], float]:
        return lambda: request.run(arrival)

    found: list[float | None] = together([call(request) for request in requests])
    failed = found.count(None)
    assert not failed, f"{failed} of {len(requests)} requests failed"
    return [seconds for seconds in found if seconds is not None]


# --- the three ways --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """requests, tokens: of each measurement. rounds: repetitions."""

    requests: int
    tokens: int
    rounds: int
    folder: Path

    def spread(self, targets: Sequence[tuple[Server, str]], first: int) -> list[Request]:
        """The requests of one measurement, over (server, model) in turn."""
        chosen = (targets[i % len(targets)] for i in range(self.requests))
        return [
            Request(server=server, model=model, number=first + i, tokens=self.tokens)
            for i, (server, model) in enumerate(chosen)
        ]

    def bursts(self, targets: Sequence[tuple[Server, str]]) -> Callable[[int], list[float]]:
        """All requests at once; a `run` of `measured`."""

        def run(first: int) -> list[float]:
            return burst(self.spread(targets, first), time.perf_counter())

        return run

    def measured(
        self, way: str, variants: int, servers: Sequence[Server], run: Callable[[int], list[float]]
    ) -> Iterator[Timed]:
        """Repetitions of a measurement after one that warms up. run: takes the number of its first request."""
        run(0)
        for each in range(1, self.rounds + 1):
            began = time.perf_counter()
            first = run(each * self.requests)
            seconds = time.perf_counter() - began
            yield Timed(way=way, variants=variants, seconds=seconds, first=tuple(first), memory=memory_of(servers))


def one_batch(inputs: Inputs, load: Load) -> Iterator[Timed]:
    """A server of all variants, of which the first ones are asked for."""
    modules = [f"{name}={path}" for name, path in inputs.deltas.items()]
    count = str(len(modules))
    arguments = ("--worker-cls", WORKER, "--enable-lora", "--max-loras", count, "--max-cpu-loras", count)
    with serve(inputs.base, *arguments, "--lora-modules", *modules, log=load.folder / "batch.log") as server:
        for variants in COUNTS:
            targets = [(server, name) for name in list(inputs.deltas)[:variants]]
            yield from load.measured("one batch", variants, [server], load.bursts(targets))


def swaps(inputs: Inputs, load: Load) -> Iterator[Timed]:
    """A server that is swapped between the batches of one variant each."""
    arguments = ("--load-format", "peraxis", "--weight-transfer-config", '{"backend": "peraxis"}')
    log, environment = load.folder / "swaps.log", {"VLLM_PLUGINS": "peraxis"}
    with serve(inputs.base, *arguments, log=log, environment=environment) as server:
        for name, path in inputs.deltas.items():
            status, answer = server.post("/v1/peraxis/variants", {"name": name, "delta": path})
            assert status == 200, answer
        for variants in COUNTS:
            names = list(inputs.deltas)[:variants]

            def run(first: int, names: Sequence[str] = tuple(names)) -> list[float]:
                arrival, found = time.perf_counter(), []
                requests = load.spread([(server, "base")], first)
                for i, name in enumerate(names):
                    status, answer = server.post("/v1/peraxis/use", {"variant": name})
                    assert status == 200, answer
                    found += burst(requests[i :: len(names)], arrival)
                return found

            yield from load.measured("swaps", variants, [server], run)


def servers(inputs: Inputs, load: Load, most: int) -> Iterator[Timed]:
    """1, 2, 4, ... stock servers, at most `most`."""
    with contextlib.ExitStack() as stack:
        running: list[Server] = []
        for name, path in list(inputs.applied.items())[:most]:
            running.append(stack.enter_context(serve(path, log=load.folder / f"server-{name}.log")))
            if len(running) & (len(running) - 1):
                continue
            targets = [(server, "base") for server in running]
            yield from load.measured("servers", len(running), running, load.bursts(targets))


def main() -> int:
    """Make the pair, measure, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser, hidden=768, layers=10, vocabulary=16384)
    parser.add_argument("--requests", type=int, default=32, help="of one measurement")
    parser.add_argument("--tokens", type=int, default=16, help="of one request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--servers", type=int, default=2, help="stock servers at the same time, at most")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: list[Timed] = []
    with tempfile.TemporaryDirectory() as name:
        inputs = make_inputs(options, Path(name), variants=max(COUNTS), applied=options.servers)
        load = Load(requests=options.requests, tokens=options.tokens, rounds=options.rounds, folder=Path(name))
        print("| way | variants | requests/s | first token, median | 95% | memory |\n|---|---|---|---|---|---|")
        for way in (servers(inputs, load, options.servers), one_batch(inputs, load), swaps(inputs, load)):
            for timed in way:
                found.append(timed)
                same = [each for each in found if (each.way, each.variants) == (timed.way, timed.variants)]
                if len(same) == options.rounds:
                    print(timed.row(same), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(each) for each in found], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
