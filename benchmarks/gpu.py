"""Run all tests and benchmarks that need a GPU, in one command of at most nine minutes.

    python benchmarks/gpu.py --json gpu.json               on a GPU: 8B shapes
    python benchmarks/gpu.py --json gpu.json --small       on any machine: Triton's interpreter, small shapes

    tests      the tests of the loader and of the kernels, including those marked `cuda`
    compress   a small pair through `compress`, on the device and on the processor; `verify` accepts both
    updates    device_updates.py: exact updates decoded on the device, beside a copy of the weights
    load       load.py: swaps from every tier
    serve      serve.py: decode and prefill with 1 to 32 variants
    block      compress_speed.py: the steps of a fit on one decoder block
    sanitizer  the tests of the kernels under compute-sanitizer, if it is installed

Each step runs in its own process and adds its figures to the JSON. A step that exceeds --limit is left out. A second
run of the same command runs the missing and failed steps. `failed` lists the failed steps; their `error` is the end of
their output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compress_speed import write_deep_pair, write_text
from harness import machine, replace

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
KERNELS = ("test_kernels.py", "test_exact_kernel.py", "test_serving_kernels.py", "test_cuda.py", "test_cuda_exact.py")


@dataclass(frozen=True, slots=True)
class Run:
    """The parameters of a step. device: torch's name of the device. folder: for temporary files."""

    small: bool
    device: str
    folder: Path

    def python(self, *words: str) -> list[str]:
        return [sys.executable, *words]


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a step. figures: None if there are none. error: the reason of a failure, or empty."""

    figures: Any
    error: str = ""


def _process(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run one process and capture its output. Raises TimeoutExpired after `seconds` and kills its process group."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, printed)


def _tail(text: str, lines: int = 200) -> str:
    return "\n".join(text.splitlines()[-lines:])


def _pytest(run: Run, seconds: float, *words: str, through: tuple[str, ...] = ()) -> Done:
    """Run tests. The figures are the numbers of passed and skipped tests and the names of the failed ones."""
    report = run.folder / "tests.xml"
    report.unlink(missing_ok=True)
    command = [*through, *run.python("-m", "pytest", "-q", "-p", "no:benchmark", f"--junit-xml={report}", *words)]
    done = _process(command, seconds)
    if not report.is_file():
        return Done(None, _tail(done.stdout))
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    figures = {
        "passed": len(cases) - len(bad) - skipped,
        "skipped": skipped,
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
    }
    return Done(figures, _tail(done.stdout) if done.returncode else "")


def tests(run: Run, seconds: float) -> Done:
    """Run the tests of the loader, the operations and the kernels."""
    if run.small:
        return _pytest(run, seconds, *(f"tests/loader/{name}" for name in KERNELS))
    parallel = ["-n", str(min(12, os.cpu_count() or 1))] if _has("xdist") else []
    return _pytest(run, seconds, *parallel, "tests/loader", "tests/ops", "tests/tools/test_sign_kernels.py")


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _benchmark(run: Run, seconds: float, script: str, *words: str) -> Done:
    target = run.folder / f"{script}.json"
    done = _process(run.python(str(HERE / script), "--json", str(target), *words), seconds)
    if not target.is_file():
        return Done(None, _tail(done.stdout))
    figures = json.loads(target.read_text())
    del figures["machine"]
    return Done(figures, _tail(done.stdout) if done.returncode else "")


def load(run: Run, seconds: float) -> Done:
    """Run load.py."""
    size = ["--preset", "tiny", "--repeat", "2"] if run.small else ["--preset", "8b", "--loads", "2"]
    return _benchmark(run, seconds, "load.py", "--check", *size)


def serve(run: Run, seconds: float) -> Done:
    """Run serve.py."""
    small = ["--preset", "tiny", "--variants", "1", "2", "--prompt", "8", "--repeat", "2"]
    return _benchmark(run, seconds, "serve.py", "--check", *(small if run.small else ["--preset", "8b"]))


def block(run: Run, seconds: float) -> Done:
    """Run compress_speed.py on one block."""
    size = ["--block", "llama-3.2-1b", "--scale", "32", "--length", "16"] if run.small else ["--block", "llama-3.1-8b"]
    return _benchmark(run, seconds, "compress_speed.py", *size, "--device", run.device, "--repeat", "1")


def updates(run: Run, seconds: float) -> Done:
    """Run device_updates.py."""
    weights = 1 << 7 if run.small else 1 << 26
    repeat = "1" if run.small else "5"
    words = ("--device", run.device, "--weights", str(weights), "--repeat", repeat)
    return _benchmark(run, seconds, "device_updates.py", *words)


def compress(run: Run, seconds: float) -> Done:
    """Compress and verify the same pair on the device and on the CPU. The figures are seconds and bytes of each."""
    end = time.monotonic() + seconds
    base, tuned = write_deep_pair(run.folder, 2, width=64 if run.small else 256)
    text = write_text(run.folder / "text.jsonl")
    length = "32" if run.small else "128"
    figures: dict[str, Any] = {}
    for device in dict.fromkeys((run.device, "cpu")):
        out = run.folder / f"{device}.pxd"
        begin = time.perf_counter()
        for words in (
            ["compress", base, tuned, "-o", out, "--calibration", text, "--sequence-length", length,
             "--device", device, "--distill-samples", "4", "--distill-epochs", "1", "--generated-samples", "4"],
            ["verify", out, "--base", base],
        ):  # fmt: skip
            done = _process(run.python("-m", "peraxis_tools", *map(str, words)), end - time.monotonic())
            if done.returncode:
                return Done(figures, f"{words[0]} on {device}\n{_tail(done.stdout)}")
        figures[device] = {"seconds": time.perf_counter() - begin, "bytes": out.stat().st_size}
    return Done(figures)


def sanitizer(run: Run, seconds: float) -> Done:
    """Run the tests of the kernels under compute-sanitizer."""
    program = shutil.which("compute-sanitizer")
    if program is None or run.device == "cpu":
        return Done("compute-sanitizer is not installed, or there is no device")
    through = (program, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all")
    return _pytest(
        run,
        seconds,
        "tests/loader/test_exact_kernel.py",
        "tests/loader/test_kernels.py",
        "-m",
        "not slow",
        "-p",
        "no:xdist",
        through=through,
    )


STEPS: tuple[tuple[Callable[[Run, float], Done], int], ...] = (
    (tests, 300), (compress, 120), (updates, 60), (load, 300), (serve, 180), (block, 240), (sanitizer, 200),
)  # fmt: skip


def measure(run: Run, path: Path, limit: float, names: list[str]) -> dict[str, Any]:
    """Run every step that the JSON lacks, within the limit in seconds. Writes the JSON after each step."""
    document: dict[str, Any] = {"schema": 1, "benchmark": "gpu", "parameters": {"small": run.small}, "steps": {}}
    if path.is_file():
        document = json.loads(path.read_text())
    document["machine"] = machine()
    end = time.monotonic() + limit
    for step, longest in STEPS:
        name, left = step.__name__, end - time.monotonic()
        held = document["steps"].get(name)
        if name not in names or (held and not held["error"]) or left < 5:
            continue
        begin = time.monotonic()
        try:
            done = step(run, left if run.small else min(longest, left))  # a step's limit is that of a GPU machine
        except subprocess.TimeoutExpired:
            sys.stdout.write(f"{name}: cut after {time.monotonic() - begin:.0f} s\n")
            continue
        took = time.monotonic() - begin
        document["steps"][name] = {"seconds": took, "figures": done.figures, "error": done.error}
        sys.stdout.write(f"{name}: {'failed' if done.error else 'done'} in {took:.0f} s\n{_tail(done.error, 25)}\n")
        sys.stdout.flush()
        document["failed"] = [key for key, value in document["steps"].items() if value["error"]]
        document["missing"] = [one.__name__ for one, _ in STEPS if one.__name__ not in document["steps"]]
        replace(path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
    return document


def main() -> int:
    """Run the steps. Returns 1 if one failed, 2 if one is missing."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file of the figures; steps in it are not run again")
    parser.add_argument("--small", action="store_true", default=not cuda, help="small shapes")
    parser.add_argument("--limit", type=float, default=520, help="time limit of all steps together, in seconds")
    parser.add_argument("--steps", nargs="+", default=[step.__name__ for step, _ in STEPS])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options.small, "cuda" if cuda else "cpu", Path(folder))
        document = measure(run, options.json, options.limit, options.steps)
    if document.get("failed"):
        return 1
    return 2 if set(options.steps) - set(document["steps"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
