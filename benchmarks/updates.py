"""Exact updates beside the wires of other systems (update_wires.py): bytes, speed and memory of each update.

    python benchmarks/updates.py --json updates.json                                   drawn updates; a minute
    python benchmarks/updates.py --weights 0 --model FOLDER --text rows.jsonl          real steps of a causal model

Real steps are supervised fine-tuning and REINFORCE at three rates, cold and warm (update_sequences.py). Each row of the
text has the key `text`. Bytes are for each changed weight, with index; `bound` is the entropy of the step given the
exponent of the old weight. Each wire is decoded and applied in place, in turns with a copy of the weights and with the
other wires; `ratio` is its speed relative to that copy. Times are CPU seconds of one thread, or with --threads wall
seconds. Peers have one thread. Memory: what applying allocates beside the weights and the update.

Updates that change nothing are named on standard error and left out.

With --check the exit code is 1 if a limit is missed. Shares of the bytes of the best peer: 0.6 from 0.2 to 50% changed,
1 elsewhere. 1.15 of `bound`. `keyed` is as fast as XOR + zstd, `gaps` twice as fast. Encoding: 0.3 GB/s.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import Benchmark, Timing, arguments
from update_sequences import Update, drawn, policy_gradient, supervised
from update_wires import MODES, Wire, Words, bound, ours, peers

from peraxis_format.dtypes import DType
from peraxis_format.ops.exact import encode

WHOLE = "XOR + zstd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What the limits are about, of one update. bytes: for each changed weight; pace: against the copy; by wire."""

    label: str
    changed: float
    bound: float
    bytes: dict[str, float]
    pace: dict[str, float]
    encode: dict[str, float]

    @property
    def best_peer(self) -> float:
        """The least bytes of a wire of another system."""
        return min(size for name, size in self.bytes.items() if name not in MODES)


def in_turns(
    actions: Iterable[Callable[[Words], object]], old: Words, *, repeat: int, threads: int
) -> Iterator[Timing]:
    """Time actions in turns, each on its own copy of the weights. The first turn is not counted."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    actions = list(actions)
    weights = old.copy()
    seconds: list[list[float]] = [[] for _ in actions]
    for turn in range(repeat + 1):
        for action, column in zip(actions, seconds, strict=True):
            weights[:] = old
            begin = clock()
            action(weights)
            if turn:
                column.append(clock() - begin)
    return (Timing(tuple(column)) for column in seconds)


def allocated(wire: Wire, old: Words, new: Words) -> int:
    """Bytes that applying allocates at its peak. Raises RuntimeError if the weights are not the new ones."""
    weights = old.copy()
    tracemalloc.start()
    wire.apply(weights)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if not np.array_equal(weights, new):
        raise RuntimeError(f"{wire.name}: applying it gives other weights")
    return peak + (wire.pool.max_memory() or 0)


def measure(bench: Benchmark, update: Update, options: argparse.Namespace) -> Figures | None:
    """Add the lines of one update. None if it changes nothing."""
    old, new, threads = update.old, update.new, options.threads
    changed = int(np.count_nonzero(old != new))
    if not changed:
        return None
    wires = [*ours(old, new, threads), *peers(old, new)]
    share, least = changed / old.size, bound(old, new) / changed
    label = f"{update.label}, {share:.2%}"
    sizes = {wire.name: wire.size / changed for wire in wires}
    memory = {wire.name: allocated(wire, old, new) for wire in wires}
    other = np.empty_like(old)
    copy, *applied = in_turns(
        [lambda w: np.copyto(other, w), *(wire.apply for wire in wires)], old, repeat=options.repeat, threads=threads
    )
    encoders = [lambda w, p=prefer: encode(w, new, DType.BF16, prefer=p, threads=threads) for prefer in MODES.values()]
    encoded = dict(zip(MODES, in_turns(encoders, old, repeat=2, threads=threads), strict=True))
    bench.add(f"{label}: copy", copy, moved=old.nbytes, bound=least, changed=share)
    pace = {}
    for wire, timing in zip(wires, applied, strict=True):
        size, peak = sizes[wire.name], memory[wire.name]
        pace[wire.name] = timing.speed_over(copy)
        note = f"{size:.2f} bytes, {size / least:.2f} of the bound; allocates {peak / 1e6:.3g} MB"
        bench.add(
            f"{label}: {wire.name}",
            timing,
            moved=old.nbytes,
            ratio=pace[wire.name],
            note=note,
            bytes=size,
            allocates=peak,
        )
    speeds = {}
    for name, timing in encoded.items():
        speeds[name] = old.nbytes / timing.median / 1e9
        bench.add(f"{label}: encode, {name}", timing, moved=old.nbytes)
    return Figures(label=label, changed=share, bound=least, bytes=sizes, pace=pace, encode=speeds)


def check(bench: Benchmark, rows: list[Figures]) -> None:
    """Check the limits of the module's docstring, each on the update that is furthest from it."""

    def most(name: str, value: Callable[[Figures], float], limit: float, some: list[Figures]) -> None:
        if some:
            worst = max(some, key=value)
            bench.check(name, value(worst), at_most=limit, note=worst.label)

    def least(name: str, value: Callable[[Figures], float], limit: float) -> None:
        worst = min(rows, key=value)
        bench.check(name, value(worst), at_least=limit, note=worst.label)

    middle = [row for row in rows if 0.002 <= row.changed <= 0.5]
    others = [row for row in rows if row not in middle]
    of_peer = "keyed, of the bytes of the best peer"
    most(f"{of_peer}, 0.2 to 50%", lambda row: row.bytes["keyed"] / row.best_peer, 0.6, middle)
    most(f"{of_peer}, elsewhere", lambda row: row.bytes["keyed"] / row.best_peer, 1.0, others)
    most("keyed, of the bound", lambda row: row.bytes["keyed"] / row.bound, 1.15, rows)
    least(f"keyed, speed over {WHOLE}", lambda row: row.pace["keyed"] / row.pace[WHOLE], 1.0)
    least(f"gaps, speed over {WHOLE}", lambda row: row.pace["gaps"] / row.pace[WHOLE], 2.0)
    least("encoding keyed, GB/s", lambda row: row.encode["keyed"], 0.3)
    least("encoding gaps, GB/s", lambda row: row.encode["gaps"], 0.3)


def main() -> int:
    """Measure all updates. Returns 1 if a limit is missed and --check is given."""
    parser = arguments(__doc__)
    parser.set_defaults(repeat=5)
    parser.add_argument("--weights", type=int, default=5 << 20, help="weights of a drawn update; 0: no drawn updates")
    parser.add_argument("--model", type=Path, help="a causal model: real steps of it, too")
    parser.add_argument("--text", type=Path, help="the rows that --model trains on, and takes prompts from")
    parser.add_argument("--steps", type=int, default=8, help="steps of a sequence; the first and the last are measured")
    parser.add_argument("--threads", type=int, default=1, help="threads of exact updates")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is missed")
    options = parser.parse_args()
    if options.model is not None and options.text is None:
        parser.error("--model needs --text")
    updates = [drawn(options.weights)] if options.weights else []
    if options.model is not None:
        updates += [
            kind(options.model, options.text, options.steps, options.threads) for kind in (supervised, policy_gradient)
        ]
    bench = Benchmark("updates", parameters={"weights": options.weights, "threads": options.threads})
    rows = []
    for update in itertools.chain(*updates):
        figures = measure(bench, update, options)
        if figures is not None:
            rows.append(figures)
        label = f"{update.label}: changes nothing; left out" if figures is None else figures.label
        print(label, file=sys.stderr, flush=True)
    if rows:
        check(bench, rows)
    passed = bench.finish(options.json, options.plot)
    return 0 if passed or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
