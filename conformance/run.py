"""Run an adapter over cases and judge its replies.

    case -> arguments -> process or served line -> Reply -> judge -> Outcome

An adapter is any command (README.md, protocol v1). Its stderr is not judged. It runs in a separate process with limits
on time and memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .cases import Case, Corpus
from .judge import compare_decoded, compare_dump, compare_tensors
from .process import AdapterError, Reply, Server, call

__all__ = ["Adapter", "Caps", "Outcome", "Summary", "laid_out", "run_case", "run_cases"]

ACCEPTED, REJECTED, UNSUPPORTED = 0, 1, 77
ROOMY_MIB = 256
SCRATCH_MIB = 1536


@dataclass(frozen=True, kw_only=True, slots=True)
class Caps:
    """An adapter's capabilities, by its own report."""

    implementation: str
    version: str
    spec: tuple[str, ...]
    features: frozenset[str]
    operations: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The outcome of one case. status: passed, failed, unsupported (the adapter does not offer it), or skipped."""

    case: Case
    status: str
    detail: str = ""
    code: str | None = None
    seconds: float = 0.0
    mib: int | None = None

    @property
    def code_matches(self) -> bool:
        """Whether the code is one of the recommended ones (SHOULD)."""
        return not self.case.codes or self.code in self.case.codes


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """All outcomes of one adapter."""

    caps: Caps
    outcomes: tuple[Outcome, ...]
    seconds: float

    def count(self, status: str) -> int:
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def passed(self) -> bool:
        """True if at least one case passed and none failed."""
        return self.count("failed") == 0 and self.count("passed") > 0

    @property
    def other_codes(self) -> int:
        """Rejections in the right phase with a code that is not recommended."""
        return sum(o.status == "passed" and not o.code_matches for o in self.outcomes)


class Adapter:
    """A command with its capabilities; `serve` is used if it is offered."""

    def __init__(self, command: Sequence[str], *, serve: bool = True, address_space_mib: int | None = None) -> None:
        self.command = list(command)
        self.address_space_mib = address_space_mib
        self.caps = self._caps()
        self._serves = serve and "serve" in self.caps.operations
        self._local = threading.local()
        self._servers: list[Server] = []
        self._proven: set[tuple[str, bool]] = set()

    def _caps(self) -> Caps:
        reply = call([*self.command, "caps"], seconds=60, mib=4096)
        said = reply.result
        if reply.problem or reply.exit != 0 or not isinstance(said, dict):
            error = f"; it says {reply.error!r}" if reply.error else ""
            why = (
                f"no JSON object on standard output: {reply.text!r}" if reply.exit == 0 else f"exit status {reply.exit}"
            )
            raise AdapterError(f"`caps` failed: {reply.problem or why}{error}")
        try:
            if said["protocol"] != 1:
                raise AdapterError(f"the adapter speaks protocol {said['protocol']}, this kit speaks 1")
            return Caps(
                implementation=str(said["implementation"]),
                version=str(said["version"]),
                spec=tuple(said["spec"]),
                features=frozenset(said["features"]),
                operations=frozenset(said["operations"]),
            )
        except (KeyError, TypeError) as error:
            raise AdapterError(f"`caps` lacks {error}") from None

    def ask(self, case: Case, arguments: Sequence[str]) -> Reply:
        """Run one operation. The first case of each kind runs as a command even if the adapter serves."""
        kind = (case.operation, case.accepts)
        # The memory of a large case in a served process would count for the next one.
        if not self._serves or kind not in self._proven or case.mib > ROOMY_MIB:
            self._proven.add(kind)
            return call(
                [*self.command, *arguments],
                seconds=case.seconds,
                mib=case.mib,
                address_space_mib=self.address_space_mib,
            )
        server = getattr(self._local, "server", None)
        if server is None or not server.alive:
            server = self._local.server = Server([*self.command, "serve"])
            self._servers.append(server)
        return server.ask(arguments, seconds=case.seconds, mib=case.mib)

    def close(self) -> None:
        """End every served process."""
        for server in self._servers:
            server.close()


def run_case(adapter: Adapter, corpus: Corpus, case: Case) -> Outcome:
    """One case, from its files to the verdict."""
    if case.operation not in adapter.caps.operations:
        return Outcome(case=case, status="unsupported", detail=f"the adapter does not offer {case.operation}")
    if lacking := sorted(set(case.features) - adapter.caps.features):
        detail = f"the adapter does not offer the feature {', '.join(lacking)}"
        return Outcome(case=case, status="unsupported", detail=detail)
    folder = Path(tempfile.mkdtemp(prefix="case-", dir=corpus.scratch))
    try:
        arguments, output, dump = prepare(adapter, corpus, case, folder)
        reply = adapter.ask(case, arguments)
        detail = judge(corpus, case, reply, output, dump) or left_behind(folder, output, dump)
    except OSError as error:
        return Outcome(case=case, status="skipped", detail=f"cannot be laid out here: {error.strerror}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    code = reply.result.get("code") if isinstance(reply.result, dict) else None
    status = "failed" if detail else "passed"
    return Outcome(case=case, status=status, detail=detail, code=code, seconds=reply.seconds, mib=reply.mib)


def prepare(adapter: Adapter, corpus: Corpus, case: Case, folder: Path) -> tuple[list[str], Path, Path | None]:
    """The arguments of a case, the path of its output, and the folder of its dump."""
    output = folder / ("out.pxd" if case.operation == "encode" else "out.safetensors")
    if case.operation == "encode":
        return ["encode", str(corpus.source(case)), "--out", str(output)], output, None
    file = str(corpus.path(case, "file"))
    if case.operation == "apply":
        return ["apply", file, "--base", str(corpus.path(case, "base")), "--out", str(output)], output, None
    if "dump" in adapter.caps.operations and case.accepts and case.expect.get("modules"):
        dump = folder / "dump"
        dump.mkdir()
        return ["decode", file, "--dump", str(dump)], output, dump
    return ["decode", file], output, None


def judge(corpus: Corpus, case: Case, reply: Reply, output: Path, dump: Path | None) -> str:
    """The fault of a reply, or an empty text."""
    if reply.problem:
        return reply.problem
    if reply.exit == UNSUPPORTED:
        return f"says unsupported (exit 77), but `caps` offers {case.operation}"
    if reply.exit not in (ACCEPTED, REJECTED):
        return f"exit status {reply.exit}; 0, 1 and 77 are allowed"
    said = reply.result
    if not isinstance(said, dict) or said.get("ok") is not (reply.exit == ACCEPTED):
        if said is None:
            return f"exit status {reply.exit} without a result" + (f"; it says {reply.error!a}" if reply.error else "")
        return f"exit status {reply.exit} and the result {json.dumps(said)[:120]} do not agree"
    if case.accepts != (reply.exit == ACCEPTED):
        return (
            "accepted, must be rejected"
            if reply.exit == ACCEPTED
            else f"rejected ({said.get('code')}), must be accepted"
        )
    if not case.accepts:
        if output.exists():
            return "rejected, but an output file is there"
        wanted = case.phase
        return (
            "" if wanted is None or said.get("phase") == wanted else f"phase {said.get('phase')!r}, must be {wanted!r}"
        )
    if case.operation == "decode":
        return compare_decoded(case.expect, said) or (compare_dump(case.expect, dump) if dump else "")
    if not output.is_file():
        return "accepted, but wrote no output file"
    expected = corpus.path(case, "output").read_bytes()
    if case.operation == "apply":
        return compare_tensors(expected, output.read_bytes())
    return first_difference(expected, output.read_bytes())


def left_behind(folder: Path, output: Path, dump: Path | None) -> str:
    """The names of other files beside the output, as a problem."""
    others = sorted(path.name for path in folder.iterdir() if path not in (output, dump))
    return f"left {', '.join(others)} beside the output" if others else ""


def first_difference(expected: bytes, made: bytes) -> str:
    if made == expected:
        return ""
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, made, strict=False)) if a != b), min(len(expected), len(made))
    )
    return f"the file differs at byte {at} ({len(made)} bytes, must be {len(expected)})"


def scratch_folder() -> str | None:
    """A folder in memory if there is one: only there a file of 2^53 bytes is possible, and it is fast."""
    memory = "/dev/shm"
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > SCRATCH_MIB << 20
    return memory if roomy else None


@contextlib.contextmanager
def laid_out(root: Path | None = None) -> Iterator[Corpus]:
    """The corpus with a scratch folder for files that it does not store."""
    with tempfile.TemporaryDirectory(prefix="pxd-conformance-", dir=scratch_folder()) as scratch:
        yield Corpus(root, scratch=Path(scratch)) if root else Corpus(scratch=Path(scratch))


def run_cases(
    adapter: Adapter,
    corpus: Corpus,
    cases: Iterable[Case],
    *,
    jobs: int = 1,
    stop_at_first: bool = False,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Summary:
    """Run the cases; outcomes are in their order, also for progress. Ends the adapter.

    Raises CorpusError if a file is damaged.
    """
    started = time.monotonic()
    stop = threading.Event()

    def one(case: Case) -> Outcome | None:
        if stop.is_set():
            return None
        outcome = run_case(adapter, corpus, case)
        if stop_at_first and outcome.status == "failed":
            stop.set()
        return outcome

    outcomes: list[Outcome] = []

    def take(results: Iterable[Outcome | None]) -> None:
        for outcome in results:
            if outcome is not None:
                progress(outcome)
                outcomes.append(outcome)

    try:
        if jobs == 1:
            take(map(one, cases))
        else:
            with ThreadPoolExecutor(max_workers=jobs) as pool:
                take(pool.map(one, cases))
    finally:
        adapter.close()
    return Summary(caps=adapter.caps, outcomes=tuple(outcomes), seconds=time.monotonic() - started)
