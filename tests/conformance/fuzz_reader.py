"""Fuzz the reader: it raises only PXD errors, its memory is bounded, and the Rust parser accepts what it accepts.

    python -m tests.conformance.fuzz_reader --seconds 900             random decisions, or
    python -m tests.conformance.fuzz_reader --large --seconds 900     the same on headers of up to 64 MiB, or
    python -m tests.conformance.fuzz_reader --engine atheris --seconds 900     guided by coverage

The counts so far are printed every 100,000 inputs (--large: 100). An input that breaks a rule is written to --crashes
and ends the run with status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Failure", "Fuzzer", "Tally", "main", "seed_files"]

MEMORY_MIB = 64


class Failure(Exception):  # noqa: N818  not an error of the program
    """An input breaks a rule."""


@dataclass(slots=True)
class Tally:
    """The counts of a run. headers: accepted by steps 1 to 8; files: by 1 to 11. beyond_mib: memory beyond the file."""

    inputs: int = 0
    headers: int = 0
    files: int = 0
    seconds: float = 0.0
    beyond_mib: int = 0

    def __str__(self) -> str:
        rate = self.inputs / max(self.seconds, 1e-9)
        return (
            f"{self.inputs:,} inputs in {self.seconds:.0f} s ({rate:.0f}/s): "
            f"{self.headers:,} passed the header's checks, {self.files:,} every check; "
            f"memory grew by {self.beyond_mib} MiB beyond the file"
        )


def seed_files() -> list[bytes]:
    """Return every stored file of the corpus; small files are twice as likely to be whole."""
    import peraxis_conformance

    root = Path(peraxis_conformance.__file__).parent
    found = sorted(
        path for folder in ("valid", "apply", "invalid", "hostile") for path in (root / folder).glob("*.pxd")
    )
    valid = [path.read_bytes() for path in found if path.parent.name in ("valid", "apply")]
    return valid * 3 + [path.read_bytes() for path in found if path.parent.name not in ("valid", "apply")]


def large_files() -> list[bytes]:
    """Return the files of the corpus that the kit generates: the limits of SPEC 9, and bombs."""
    from peraxis_conformance.generator.large import LARGE

    return [make() for make in LARGE.values()]


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def status_mib(key: str) -> int:
    """Return VmRSS or VmHWM of this process in MiB (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) >> 10


class Fuzzer:
    """Checks and counts inputs. reader: (bytes) -> (header, manifest), the function under test.

    large: measure the memory of each input separately (Linux), which takes too long for small inputs.
    """

    def __init__(self, scratch: Path, reader: Callable[[bytes], Any] | None = None, *, large: bool = False) -> None:
        import safetensors

        import peraxis_format as pxd

        self.pxd: Any = pxd
        self.rust: Any = safetensors
        self.scratch = scratch / "input.pxd"
        self.reader = reader or (
            lambda data: pxd.read_header(lambda offset, size: data[offset : offset + size], len(data))
        )
        self.tally = Tally()
        self.large = large
        self.start_mib = 0

    def check(self, data: bytes) -> None:
        """Check one input. Raises Failure, or any exception that the reader lets through."""
        self.tally.inputs += 1
        if self.large:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the current memory
            self.start_mib = status_mib("VmRSS")
        try:
            header, manifest = self.reader(data)
        except self.pxd.PxdError:
            return
        finally:
            self.check_memory(len(data))
        self.tally.headers += 1
        self.compare_with_rust(header, data)
        self.check_whole(data, manifest)

    def check_memory(self, size: int) -> None:
        """Check the peak memory of the process. After the first hundred inputs, growth is due to the last input."""
        if self.large:
            growth = status_mib("VmHWM") - self.start_mib
        else:
            if self.tally.inputs == 100:
                self.start_mib = peak_mib()
            growth = peak_mib() - self.start_mib if self.start_mib else 0
        beyond = growth - (size >> 20)
        self.tally.beyond_mib = max(self.tally.beyond_mib, beyond)
        # SPEC 12: eight times the header and 8 MiB. A process that has read many files keeps some more.
        if beyond > max(MEMORY_MIB, 8 + 8 * (size >> 20)):
            raise Failure(f"memory grew by {growth} MiB on an input of {size} bytes")

    def compare_with_rust(self, header: Any, data: bytes) -> None:
        """Check that the Rust parser accepts the file and finds the same tensors."""
        try:
            theirs = dict(self.rust.deserialize(data))
        except self.rust.SafetensorError as error:
            raise Failure(f"accepted, but the Rust parser says: {error}") from None
        ours = {
            r.name: (r.dtype.value, list(r.shape), data[header.size + r.begin : header.size + r.end])
            for r in header.records
        }
        if ours.keys() != theirs.keys():
            raise Failure("other names than the Rust parser's")
        for name, (dtype, shape, held) in ours.items():
            other = theirs[name]
            if (dtype, shape, held) != (other["dtype"], other["shape"], bytes(other["data"])):
                raise Failure(f"{name!r} is another tensor than the Rust parser's")

    def check_whole(self, data: bytes, manifest: Any) -> None:
        """Check the file on a disk: it has the same manifest, passes steps 9 to 11, and every module loads."""
        self.scratch.write_bytes(data)
        with contextlib.suppress(self.pxd.PxdError), self.pxd.open(self.scratch) as delta:
            if delta.manifest != manifest:
                raise Failure("the file and its bytes give different manifests")
            delta.verify(workers=1)
            for name in delta:
                delta.load(name)
            self.tally.files += 1


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="pxd-fuzz-", dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


def keep(data: bytes, error: BaseException, folder: Path) -> Path:
    """Write an input that breaks a rule to the folder of crashes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.pxd"
    path.write_bytes(data)
    sys.stderr.write(f"{type(error).__name__}: {error}\nkept as {path}\n")
    return path


def run_random(fuzzer: Fuzzer, given: argparse.Namespace) -> int:
    from tests.conformance.mutations import mutate, mutate_text

    source, started = random.Random(given.seed), time.monotonic()
    seeds, change, often = (large_files(), mutate_text, 100) if given.large else (seed_files(), mutate, 100_000)
    pick = lambda n: int(source.random() * n)  # noqa: E731  several times as fast as randrange
    status = 0

    def report(end: str) -> None:
        fuzzer.tally.seconds = time.monotonic() - started
        sys.stdout.write(f"{'large' if given.large else 'random'}, seed {given.seed}: {fuzzer.tally}{end}\n")
        sys.stdout.flush()

    while fuzzer.tally.inputs < given.runs and time.monotonic() - started < given.seconds:
        data = change(pick, seeds)
        try:
            fuzzer.check(data)
        except Exception as error:
            keep(data, error, given.crashes)
            status = 1
            break
        if fuzzer.tally.inputs % often == 0:
            report(", so far")
    report("; a rule does not hold" if status else "; every rule held")
    return status


def run_atheris(given: argparse.Namespace, scratch: Path) -> int:
    import atheris

    with atheris.instrument_imports(include=["peraxis_format"]):
        import peraxis_format  # noqa: F401
    from tests.conformance.mutations import mutate

    fuzzer, seeds, started = Fuzzer(scratch), seed_files(), time.monotonic()

    def one(decisions: bytes) -> None:
        provider = atheris.FuzzedDataProvider(decisions)
        data = mutate(lambda n: provider.ConsumeIntInRange(0, n - 1), seeds)
        try:
            fuzzer.check(data)
        except Exception as error:
            keep(data, error, given.crashes)
            raise
        if fuzzer.tally.inputs % 10_000 == 0 or fuzzer.tally.inputs == given.runs:
            fuzzer.tally.seconds = time.monotonic() - started
            sys.stdout.write(f"atheris: {fuzzer.tally}\n")
            sys.stdout.flush()

    given.crashes.mkdir(parents=True, exist_ok=True)
    flags = [
        f"-artifact_prefix={given.crashes}/",
        f"-runs={given.runs}",
        f"-max_total_time={int(given.seconds)}",
        f"-seed={given.seed}",
        "-max_len=256",
        "-rss_limit_mb=0",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *flags], one)
    atheris.Fuzz()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if no input breaks a rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("random", "atheris"), default="random")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--runs", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--crashes", type=Path, default=Path("build/fuzz"))
    given = parser.parse_args(arguments)
    with scratch_folder() as scratch:
        if given.engine == "atheris":
            return run_atheris(given, scratch)
        return run_random(Fuzzer(scratch, large=given.large), given)


if __name__ == "__main__":
    sys.exit(main())
