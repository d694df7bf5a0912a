"""Shared code of the benchmarks: timings, rates, ratios, bounds, and the output as JSON, table and plot.

    from harness import Benchmark, timed

    bench = Benchmark("apply_cpu", parameters={"threads": 2})
    copy = bench.add("copy", timed(copy_once), moved=2 * size)
    bench.add("apply", timed(apply_once), moved=size, against=copy)
    bench.finish(json_path, plot_path)

Other work disturbs every machine, so a figure is a median with its 5th and 95th percentiles, and a claim is a ratio of
two figures of one run. `timed_together` alternates the actions, so that a disturbance slows all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["Benchmark", "Check", "Result", "Timing", "arguments", "machine", "replace", "timed", "timed_together"]

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each repetition, in the order measured."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median in seconds."""
        return statistics.median(self.seconds)

    def speed_over(self, other: Timing) -> float:
        """Return the speed relative to `other`: the median ratio over repetitions that were measured in turns."""
        return statistics.median(theirs / mine for mine, theirs in zip(self.seconds, other.seconds, strict=True))

    def percentile(self, percent: float) -> float:
        """Return the nearest-rank percentile, which is one of the measured values, in seconds."""
        ordered = sorted(self.seconds)
        rank = -(-percent * len(ordered) // 100)
        return ordered[max(0, int(rank) - 1)]


def timed(
    action: Callable[[], object], *, repeat: int = 9, warmup: int = 1, sync: Callable[[], object] | None = None
) -> Timing:
    """Time `action`. sync: waits for a device and is part of the time. The first `warmup` runs are not counted."""
    return timed_together([action], repeat=repeat, warmup=warmup, sync=sync)[0]


def timed_together(
    actions: Sequence[Callable[[], object]],
    *,
    repeat: int = 9,
    warmup: int = 1,
    sync: Callable[[], object] | None = None,
) -> list[Timing]:
    """Time several actions in turns: a, b, a, b, ... A disturbance of the machine then slows all of them."""
    wait = sync or (lambda: None)
    for _ in range(warmup):
        for action in actions:
            action()
    seconds: list[list[float]] = [[] for _ in actions]
    for _ in range(repeat):
        for action, column in zip(actions, seconds, strict=True):
            wait()
            begin = time.perf_counter()
            action()
            wait()
            column.append(time.perf_counter() - begin)
    return [Timing(tuple(column)) for column in seconds]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line of a benchmark.

    median, p5, p95: seconds. moved: bytes that one repetition moves. rate: bytes per second. ratio: the rate (or the
    speed) divided by that of `against`.
    """

    name: str
    median: float
    p5: float
    p95: float
    repeats: int
    moved: int | None = None
    rate: float | None = None
    against: str | None = None
    ratio: float | None = None
    note: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A figure and its inclusive bound. note: an explanation, for example the resource that limits the figure."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the value is within the bound."""
        low, high = self.at_least, self.at_most
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    def __str__(self) -> str:
        bound = f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
        words = ("ok    " if self.ok else "missed", f"{self.name}: {self.value:.2f}, {bound}", self.note)
        return "  ".join(word for word in words if word)


class Benchmark:
    """Collects results and writes them in `finish`. Only this class prints."""

    def __init__(self, name: str, *, parameters: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.parameters = dict(parameters or {})
        self.results: list[Result] = []
        self.checks: list[Check] = []

    def add(
        self,
        name: str,
        timing: Timing,
        *,
        moved: int | None = None,
        against: Result | None = None,
        ratio: float | None = None,
        note: str = "",
        **extra: Any,
    ) -> Result:
        """Record a timing. With `against`, `ratio` defaults to that of the rates, or of the speeds without rates."""
        rate = None if moved is None else moved / timing.median
        if against is not None and ratio is None:
            both = rate is not None and against.rate is not None
            ratio = rate / against.rate if both else against.median / timing.median
        result = Result(
            name=name,
            median=timing.median,
            p5=timing.percentile(5),
            p95=timing.percentile(95),
            repeats=len(timing.seconds),
            moved=moved,
            rate=rate,
            against=None if against is None else against.name,
            ratio=ratio,
            note=note,
            extra=extra,
        )
        self.results.append(result)
        return result

    def check(
        self, name: str, value: float, *, at_least: float | None = None, at_most: float | None = None, note: str = ""
    ) -> None:
        """Record a figure and its bound. `finish` prints whether the bound is met."""
        self.checks.append(Check(name=name, value=value, at_least=at_least, at_most=at_most, note=note))

    def to_json(self) -> str:
        """Return the run as JSON: schema, machine, parameters, results, checks."""
        document = {
            "schema": SCHEMA,
            "benchmark": self.name,
            "machine": machine(),
            "parameters": self.parameters,
            "results": [asdict(result) for result in self.results],
            "checks": [{**asdict(check), "ok": check.ok} for check in self.checks],
        }
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

    def table(self) -> str:
        """Return the results as an aligned text table."""
        head = ("", "median", "p5", "p95", "GB/s", "ratio", "of", "")
        rows = [head, *(_row(result) for result in self.results)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        left = {0, 6, 7}
        lines = [
            "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        return "\n".join([self.name, *(line.rstrip() for line in lines)])

    def finish(self, json_path: Path | None = None, plot_path: Path | None = None) -> bool:
        """Print table and checks, and write JSON and plot to the given paths. Returns whether all checks pass."""
        sys.stdout.write("\n".join([self.table(), *map(str, self.checks)]) + "\n")
        if json_path is not None:
            replace(json_path, self.to_json().encode())
        if plot_path is not None and not _plot(self, plot_path):
            sys.stdout.write(f"no plot: matplotlib is not installed ({plot_path})\n")
        return all(check.ok for check in self.checks)


def _row(result: Result) -> tuple[str, ...]:
    return (
        result.name,
        _seconds(result.median),
        _seconds(result.p5),
        _seconds(result.p95),
        "" if result.rate is None else f"{result.rate / 1e9:.2f}",
        "" if result.ratio is None else f"{result.ratio:.2f}",
        result.against or "",
        result.note,
    )


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def replace(path: Path, data: bytes) -> None:
    """Write a file through a temporary file, so that it is written whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _plot(bench: Benchmark, path: Path) -> bool:
    """Plot the medians as horizontal bars with whiskers from p5 to p95. Returns False if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = bench.results[::-1]
    medians = [1e3 * result.median for result in results]
    low = [1e3 * (result.median - result.p5) for result in results]
    high = [1e3 * (result.p95 - result.median) for result in results]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.35 * len(results)))
    axes.barh([result.name for result in results], medians, xerr=[low, high], color="#4477aa", ecolor="#888888")
    axes.set_xlabel("milliseconds (median, 5th to 95th percentile)")
    axes.set_xscale("log" if max(medians) > 30 * min(medians) else "linear")
    axes.set_title(bench.name)
    figure.tight_layout()
    # The file has no dates, so the same figures give the same bytes.
    kind = path.suffix.removeprefix(".")
    figure.savefig(path, metadata={"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind))
    pyplot.close(figure)
    return True


def machine() -> dict[str, Any]:
    """Return the processor, the device and the versions, which a reader needs to compare figures. No host name."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in ("numpy", "numba", "torch", "triton", "transformers", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        torch = sys.modules["torch"]
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks: --json, --plot, --repeat."""
    parser = argparse.ArgumentParser(
        description=(description or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--plot", type=Path, default=None, help="write a plot here (.svg, .png, .pdf)")
    parser.add_argument("--repeat", type=int, default=9, help="number of repetitions; figures are medians")
    return parser
