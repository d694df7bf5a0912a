"""Compare swaps with base="undo" and with base="device": time, and memory in addition to the model.

    python benchmarks/undo.py                 small shapes on a CPU, 8B shapes on a GPU
    python benchmarks/undo.py --preset tiny   a quick run

Two variants alternate. Their signs are random, and their scales are those of a fine-tune (0.5% to 1.5% of the standard
deviation of the weights). `first use` writes the undo log of a variant. A later swap undoes the current variant and
writes the next one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from harness import Benchmark, arguments, timed
from load import PRESETS, base_refs, random_base, wait, work_folder, write_delta

from peraxis_format.torch import VariantSwitch

NAMES = ("a", "b")


def measure(bench: Benchmark, device: torch.device, preset: str, folder: Path, repeat: int) -> None:
    """Measure both modes on the same weights, one after the other."""
    base = random_base(PRESETS[preset], device)
    refs = base_refs(base)
    files = [write_delta(folder / f"{name}.pxd", base, refs, seed) for seed, name in enumerate(NAMES)]
    size = sum(tensor.nbytes for tensor in base.values())
    copied = None
    for place in ("device", "undo"):
        with VariantSwitch(base, base=place) as switch:
            for name, file in zip(NAMES, files, strict=True):
                switch.add(name, file, "pinned")

            def swap() -> None:
                switch.use(NAMES[switch.current == NAMES[0]])

            first = timed(swap, repeat=len(NAMES), warmup=0, sync=wait(device))
            later = timed(swap, repeat=repeat, sync=wait(device))
            switch.use(None)
            extra = switch.base_size + switch.undo_size // len(NAMES)
            memory = f"{extra / 1e6:.1f} MB beyond the model, {extra / size:.1%} of it"
            if place == "undo":
                memory += " for each variant"
                bench.add("undo, first use", first, moved=2 * size)
            found = bench.add(f"{place}, swap", later, moved=2 * size, against=copied, note=memory, extra=extra)
            copied = copied or found


def main() -> int:
    """Measure and write the figures."""
    parser = arguments(__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", choices=sorted(PRESETS), default="8b" if cuda else "small")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--folder", type=Path, default=None, help="where to write the files (default: temporary)")
    options = parser.parse_args()
    bench = Benchmark("undo", parameters={"preset": options.preset, "device": options.device})
    with work_folder(options.folder) as folder, torch.no_grad():
        measure(bench, torch.device(options.device), options.preset, folder, options.repeat)
    bench.finish(options.json, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
