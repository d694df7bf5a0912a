"""Apply and sign packing on the CPU, against the copy bandwidth of the same run and the plain torch expressions.

    python benchmarks/apply_cpu.py --threads 2 --check

Bytes moved: copy 2 a byte; apply reads base and mask and writes the weight; pair sums read two matrices and write a
mask. Each line is measured in turns with a copy of its own (copy, line, copy, line, ...), and its ratio is the median,
over these turns, of its rate (bytes moved a second) over the copy's: what slows the machine down slows both.

--check exits with 1 where a bound is missed: apply 0.6 of the copy, pair sums 0.4 of it, and apply 10 times as fast as
the plain expression, by the medians.
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
    """Random signs and scales of an axis."""
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
    """memcpy on several threads, each its part."""
    parts = np.array_split(np.arange(len(source)), threads)

    def copy_part(part: Array) -> None:
        np.copyto(target[part[0] : part[-1] + 1], source[part[0] : part[-1] + 1])

    return lambda: list(pool.map(copy_part, parts)) and None


def plain_apply(base: torch.Tensor, component: Component) -> Callable[[], torch.Tensor]:
    """The expression that one would write in torch."""
    mask, row = torch.from_numpy(component.mask), torch.from_numpy(component.row)
    scale = row.float() * 2.0**component.exponent

    def run() -> torch.Tensor:
        bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        signs = bits.flatten(-2).float() * 2 - 1
        return (base.float() + signs * scale[:, None]).to(torch.bfloat16)

    return run


def plain_pair(base: torch.Tensor, tuned: torch.Tensor) -> Callable[[], object]:
    """Signs slice_, means along rows and columns, in torch."""
    weights = (1 << torch.arange(8)).to(torch.uint8)

    def run() -> object:
        delta = tuned.float() - base.float()
        bits = (delta >= 0).to(torch.uint8).unflatten(-1, (-1, 8))
        size = delta.abs()
        return (bits * weights).sum(-1, dtype=torch.uint8), size.sum(0, dtype=torch.float64), size.sum(1)

    return run


def measure(options: argparse.Namespace) -> Benchmark:
    """Every line of the table, measured in turns."""
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
    # Apart: they take so long that what is measured after them is measured on a machine that has cooled down.
    few = min(options.repeat, 5)
    for name, action in (
        ("plain torch apply", plain_apply(base_torch, components["row"])),
        ("plain torch signs and sums", plain_pair(base_torch, tuned_torch)),
    ):
        bench.add(name, timed(action, repeat=few), moved=moved, against=copied)
    return bench


def check(bench: Benchmark) -> None:
    """Hold the figures to their bounds."""
    found = {result.name: result for result in bench.results}
    for name, result in found.items():
        if name.startswith("apply") and "two" not in name:
            bench.check(f"{name}, of the copy", result.ratio or 0.0, at_least=APPLY_OF_COPY)
    bench.check(f"{PAIR}, of the copy", found[PAIR].ratio or 0.0, at_least=PAIR_OF_COPY)
    faster = found["plain torch apply"].median / found["apply row"].median
    bench.check("apply row, times as fast as the plain expression", faster, at_least=APPLY_OVER_PLAIN)


def main() -> int:
    """Measure, write, and with --check compare with the bounds."""
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bound is missed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = measure(options)
    check(bench)
    return 0 if bench.finish(options.json, options.plot) or not options.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
