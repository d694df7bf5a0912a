"""Run mutated files through several loaders, which must all accept a file or all reject it in the same phase.

    python -m tests.conformance.differential --seconds 300

If loaders differ, one of them is wrong or SPEC.md is incomplete, and the corpus lacks a case. The file is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peraxis_conformance.process import Reply, Server, call

from tests.conformance.fuzz_reader import keep, scratch_folder, seed_files
from tests.conformance.helpers import compiled_loader, node_loader, reference_loader, wrong_loader
from tests.conformance.mutations import mutate

__all__ = ["disagreements", "loaders", "main"]

Loaders = Mapping[str, Any]
# The fields of a reply about files with the feature `exact`, and about its modules.
CHAIN = ("previous", "result")
UPDATE = ("index_sha256", "data_sha256", "result_sha256")


@contextlib.contextmanager
def loaders(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield loader name -> a function from arguments to a Reply."""
    compiled = compiled_loader(folder)
    commands = {"reference": reference_loader(), "javascript": node_loader(), "small": wrong_loader()}
    servers = {name: Server([*command, "serve"]) for name, command in commands.items()}

    def ask(server: Server) -> Any:
        return lambda arguments: server.ask(arguments, seconds=20, mib=1024)

    try:
        yield {
            **{name: ask(server) for name, server in servers.items()},
            "c": lambda arguments: call([*compiled, *arguments], seconds=20, mib=1024),
        }
    finally:
        for server in servers.values():
            server.close()


def verdict(reply: Reply) -> str:
    """Return what loaders must agree on: the exit status, the phase of a rejection, the content of an accepted file."""
    if reply.problem or not isinstance(reply.result, dict):
        return f"broken: {reply.problem or reply.result}"
    if reply.exit == 1:
        return f"rejected: {reply.result.get('phase')}"
    content = {key: reply.result.get(key) for key in ("content_id", "tied", "dropped", "assets", "metadata", *CHAIN)}
    # The fields that the protocol requires of a module; a loader may give more.
    keys = ("name", "dtype", "shape", "encoding", "components", "exact_sha256", *UPDATE)
    modules = [{key: module.get(key) for key in keys} for module in reply.result.get("modules", [])]
    return f"{reply.exit}: {json.dumps([content, modules], sort_keys=True)}"


def disagreements(asked: Loaders, inputs: Iterator[bytes], path: Path) -> Iterator[tuple[bytes, dict[str, str]]]:
    """Yield the inputs on which loaders differ, with each loader's verdict."""
    for data in inputs:
        path.write_bytes(data)
        said = {name: verdict(ask(["decode", str(path)])) for name, ask in asked.items()}
        if len(set(said.values())) > 1:
            yield data, said


def mutated(seed: int, runs: int, until: float, counter: list[int], *, least: int = 0) -> Iterator[bytes]:
    """Yield mutated files. counter[0] counts them. least: as many are made even after `until`."""
    source, seeds = random.Random(seed), seed_files()
    while counter[0] < runs and (counter[0] < least or time.monotonic() < until):
        counter[0] += 1
        yield mutate(lambda n: int(source.random() * n), seeds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if all loaders agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--crashes", type=Path, default=Path("build/differential"))
    given = parser.parse_args(arguments)
    counter, status, started = [0], 0, time.monotonic()
    with scratch_folder() as scratch, loaders(scratch) as asked:
        inputs = mutated(given.seed, given.runs, started + given.seconds, counter)
        for data, said in disagreements(asked, inputs, scratch / "input.pxd"):
            keep(data, ValueError(json.dumps({name: text[:60] for name, text in said.items()})), given.crashes)
            status = 1
    sys.stdout.write(f"{counter[0]:,} inputs in {time.monotonic() - started:.0f} s through four loaders\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
