"""Run mutated files through several loaders, which must all accept a file or all reject it in the same phase.

    python -m tests.conformance.differential --seconds 300
    python -m tests.conformance.differential --seconds 300 --bases       mutated bases; what is written is compared

If loaders differ, one of them is wrong or SPEC.md is incomplete, and the corpus lacks a case. The file is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peraxis_conformance.process import Reply, Server, call

from tests.conformance.fuzz_reader import keep, scratch_folder, seed_files
from tests.conformance.helpers import KIT, compiled_loader, node_loader, reference_loader, wrong_loader
from tests.conformance.mutations import mutate, mutate_text

__all__ = ["base_disagreements", "disagreements", "loaders", "main"]

_LARGE = 1 << 20  # bytes of a base that is not mutated

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


def base_cases() -> list[tuple[Path, bytes]]:
    """The files of the corpus that apply to a base of the corpus, each with the bytes of its base."""
    found = []
    for written in sorted((KIT / "apply").glob("*.out.safetensors")):
        stem = written.name.removesuffix(".out.safetensors")
        file, base = (written.with_name(f"{stem}{end}") for end in (".pxd", ".base.safetensors"))
        if file.exists() and base.exists() and base.stat().st_size < _LARGE:
            found.append((file, base.read_bytes()))
    return found


def applied(reply: Reply, written: Path) -> str:
    """Return what loaders must agree on of an application: exit status, phase, and the tensors that were written."""
    if reply.problem or not isinstance(reply.result, dict) or reply.exit not in (0, 1):
        return f"broken: {reply.problem or reply.exit}"
    if reply.exit == 1:
        return f"rejected: {reply.result.get('phase')}{', but wrote a file' if written.exists() else ''}"
    data = written.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {name: (its["dtype"], its["shape"], its["data_offsets"]) for name, its in header.items()}
    digests = {
        name: [dtype, shape, hashlib.sha256(data[start + begin : start + end]).hexdigest()]
        for name, (dtype, shape, (begin, end)) in tensors.items()
    }
    return f"wrote: {json.dumps(digests, sort_keys=True)}"


def base_disagreements(
    asked: Loaders, seed: int, runs: int, until: float, counter: list[int], folder: Path, *, least: int = 0
) -> Iterator[tuple[bytes, dict[str, str]]]:
    """Yield the mutated bases on which loaders differ. The other arguments are those of `mutated`."""
    source, cases, base = random.Random(seed), base_cases(), folder / "base.safetensors"
    while counter[0] < runs and (counter[0] < least or time.monotonic() < until):
        counter[0] += 1
        file, data = source.choice(cases)
        data = mutate_text(lambda n: int(source.random() * n), [data])
        base.write_bytes(data)
        said = {}
        for name, ask in asked.items():
            written = folder / f"{name}.safetensors"
            written.unlink(missing_ok=True)
            reply = ask(["apply", str(file), "--base", str(base), "--out", str(written)])
            said[name] = applied(reply, written)
        if len(set(said.values())) > 1 or any(text.endswith("wrote a file") for text in said.values()):
            yield data, said


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if all loaders agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bases", action="store_true", help="mutate the base of an application")
    parser.add_argument("--crashes", type=Path, default=Path("build/differential"))
    given = parser.parse_args(arguments)
    counter, status, started = [0], 0, time.monotonic()
    with scratch_folder() as scratch, loaders(scratch) as asked:
        until = started + given.seconds
        if given.bases:
            found = base_disagreements(asked, given.seed, given.runs, until, counter, scratch)
        else:
            inputs = mutated(given.seed, given.runs, until, counter)
            found = disagreements(asked, inputs, scratch / "input.pxd")
        for data, said in found:
            keep(data, ValueError(json.dumps({name: text[:60] for name, text in said.items()})), given.crashes)
            status = 1
    sys.stdout.write(f"{counter[0]:,} inputs in {time.monotonic() - started:.0f} s through four loaders\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
