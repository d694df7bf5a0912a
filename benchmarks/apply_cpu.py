"""Measure apply and sign packing on the CPU against a memory copy and against plain torch expressions.

    python benchmarks/apply_cpu.py --threads 2 --check

Bytes moved: the copy moves 2 bytes for each byte copied. Apply reads the base and the mask and writes the weight. The
sums of a pair read two matrices and write a mask. Each line alternates with its own copy (copy, line, copy, line, ...).
Its ratio is the median over these turns of its rate (bytes moved per second) divided by the rate of the copy, so a
disturbance of the machine slows both.

With --check the exit code is 1 if a bound is missed: apply reaches 0.6 of the copy, the sums of a pair reach 0.4 of the
copy, and the median of apply is 10 times as fast as the plain torch expression.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from harness import Benchmark, arguments, timed, timed_together

from peraxis_format import Array, Axis, Component, DType, pack_signs
from peraxis_format.ops.rebuild import rebuild
from peraxis_tools.ops.delta_sums import delta_sums

APPLY_OF_COPY, PAIR_OF_COPY, APPLY_OVER_PLAIN = 0.6, 0.4, 10.0
PAIR = "signs and sums of a pair"


def random_component(rng: np.random.Generator, axis: Axis, rows: int, columns: int) -> Component:
    """Return a component [rows, columns] with random signs and random scales on the given axis."""
    row = rng.uniform(0.5, 1.5, rows).astype(np.float16)
    col = rng.uniform(0.5, 1.5, columns).astype(np.float16)
    return Component(
        axis=axis,
        exponent=-9,
        mask=pack_signs(rng.random((rows, columns), np.float32) < 0.5),
        row=row if axis in (Axis.ROW, Axis.ROW_COL) else None,
        col=col if axis in (Axis.COL, Axis.ROW_COL) else None,
        scalar=row[:1] if axis is Axis.TENSOR else None,
    )


def copier(source: Array, target: Array, pool: ThreadPoolExecutor, threads: int) -> Callable[[], None]:
    """Return an action that copies `source` to `target`, one part per thread."""
    parts = np.array_split(np.arange(len(source)), threads)

    def copy_part(part: Array) -> None:
        np.copyto(target[part[0] : part[-1] + 1], source[part[0] : part[-1] + 1])

    return lambda: list(pool.map(copy_part, parts)) and None


def plain_apply(base: torch.Tensor, component: Component) -> Callable[[], torch.Tensor]:
    """Return an action that applies a row component with a plain torch expression."""
    mask, row = torch.from_numpy(component.mask), torch.from_numpy(component.row)
    scale = row.float() * 2.0**component.exponent

    def run() -> torch.Tensor:
        bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        signs = bits.flatten(-2).float() * 2 - 1
        return (base.float() + signs * scale[:, None]).to(torch.bfloat16)

    return run


def plain_pair(base: torch.Tensor, tuned: torch.Tensor) -> Callable[[], object]:
    """Return an action that computes packed signs and the sums of |delta| over columns and rows in torch."""
    weights = (1 << torch.arange(8)).to(torch.uint8)

    def run() -> object:
        delta = tuned.float() - base.float()
        bits = (delta >= 0).to(torch.uint8).unflatten(-1, (-1, 8))
        size = delta.abs()
        return (bits * weights).sum(-1, dtype=torch.uint8), size.sum(0, dtype=torch.float64), size.sum(1)

    return run


def measure(options: argparse.Namespace) -> Benchmark:
    """Measure every line of the table."""
    rows, columns, threads = options.rows, options.columns, options.threads
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((rows, columns), np.float32)
    base = (wide.view(np.uint32) >> 16).astype(np.uint16)
    tuned = base + rng.integers(0, 4, base.shape, np.uint16)
    out = np.zeros_like(base)
    components = {axis.value: random_component(rng, axis, rows, columns) for axis in Axis}
    base_torch, tuned_torch = (torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) for a in (base, tuned))
    bf16 = {"base_dtype": DType.BF16, "dtype": DType.BF16, "threads": threads, "backend": "numba"}
    mask_size = rows * -(-columns // 8)
    moved = 2 * base.nbytes + mask_size
    lines: dict[str, tuple[int, Callable[[], object]]] = {
        f"apply {axis}": (moved, lambda c=component: rebuild([c.factors(base.shape)], base, out, **bf16))
        for axis, component in components.items()
    }
    two = [factors for name in ("row", "col") for factors in components[name].factors(base.shape)]
    lines["apply row, col (two components)"] = (moved + mask_size, lambda: rebuild([two], base, out, **bf16))
    lines[PAIR] = (moved, lambda: delta_sums(base, tuned, **bf16))
    bench = Benchmark("apply_cpu", parameters={"rows": rows, "columns": columns, "threads": threads, "dtype": "BF16"})
    with ThreadPoolExecutor(threads) as pool:
        copy = copier(base, out, pool, threads)
        copied = bench.add("copy", timed(copy, repeat=options.repeat, warmup=2), moved=2 * base.nbytes)
        for name, (size, action) in lines.items():
            theirs, timing = timed_together([copy, action], repeat=options.repeat, warmup=2)
            ratio = timing.speed_over(theirs) * size / (2 * base.nbytes)
            bench.add(name, timing, moved=size, against=copied, ratio=ratio)
    # The plain expressions come last: they take so long that the machine cools down, which would change later figures.
    few = min(options.repeat, 5)
    for name, action in (
        ("plain torch apply", plain_apply(base_torch, components["row"])),
        ("plain torch signs and sums", plain_pair(base_torch, tuned_torch)),
    ):
        bench.add(name, timed(action, repeat=few), moved=moved, against=copied)
    return bench


def check(bench: Benchmark) -> None:
    """Compare the figures with their bounds."""
    found = {result.name: result for result in bench.results}
    for name, result in found.items():
        if name.startswith("apply") and "two" not in name:
            bench.check(f"{name}, of the copy", result.ratio or 0.0, at_least=APPLY_OF_COPY)
    bench.check(f"{PAIR}, of the copy", found[PAIR].ratio or 0.0, at_least=PAIR_OF_COPY)
    faster = found["plain torch apply"].median / found["apply row"].median
    bench.check("apply row, times as fast as the plain expression", faster, at_least=APPLY_OVER_PLAIN)


def main() -> int:
    """Measure and write the figures. Returns 1 if --check is given and a bound is missed."""
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = measure(options)
    check(bench)
    return 0 if bench.finish(options.json, options.plot) or not options.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
