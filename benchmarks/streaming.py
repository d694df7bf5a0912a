"""Time `compress --fit none` and `apply` on a pair of checkpoints beside reading the input and writing the output.

    python benchmarks/streaming.py --gigabytes 2 --json streaming.json

The pair is random BF16 with the proportions of a Llama. Each command runs in its own process; its peak memory is the
maximum resident set size of the operating system. The bound on memory is 1 GB plus four times the largest tensor. The
floor reads the same input files, writes as many bytes and flushes them to disk, in the same run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from harness import Benchmark, Timing, arguments, timed

import peraxis_format as pxd
from peraxis_tools.checkpoints.shards import TensorSpec, plan_shards, shard_header, write_index

WIDTH, MLP, VOCABULARY = 2048, 8192, 32_000
CHUNK = 1 << 22


def tensors(gigabytes: float) -> Iterator[TensorSpec]:
    """Yield the tensors of a checkpoint of this size: the embedding, as many layers as fit, and lm_head."""
    layer = {"q": (WIDTH, WIDTH), "k": (WIDTH // 4, WIDTH), "v": (WIDTH // 4, WIDTH), "o": (WIDTH, WIDTH)}
    layer |= {"gate": (MLP, WIDTH), "up": (MLP, WIDTH), "down": (WIDTH, MLP)}
    layer_bytes = 2 * sum(rows * cols for rows, cols in layer.values())
    count = max(1, int((gigabytes * 1e9 - 4 * VOCABULARY * WIDTH) / layer_bytes))
    yield TensorSpec("model.embed_tokens.weight", pxd.DType.BF16, (VOCABULARY, WIDTH))
    for i in range(count):
        for name, shape in layer.items():
            block = "self_attn" if name in "qkvo" else "mlp"
            yield TensorSpec(f"model.layers.{i}.{block}.{name}_proj.weight", pxd.DType.BF16, shape)
    yield TensorSpec("lm_head.weight", pxd.DType.BF16, (VOCABULARY, WIDTH))


def write_pair(folder: Path, specs: Sequence[TensorSpec]) -> None:
    """Write a base with normal weights and a fine-tune whose delta has a hundredth of their standard deviation."""
    rng = np.random.default_rng(0)
    shards = plan_shards(specs, shard_bytes=1_000_000_000)
    for name in ("base", "fine-tuned"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
        write_index(folder / name, shards)
    for shard in shards:
        with (
            open(folder / "base" / shard.file_name, "wb") as base,
            open(folder / "fine-tuned" / shard.file_name, "wb") as tuned,
        ):
            for file in (base, tuned):
                file.write(shard_header(shard.tensors))
            for spec in shard.tensors:
                for rows in range(0, spec.shape[0], 512):
                    shape = (min(512, spec.shape[0] - rows), spec.shape[1])
                    weight = rng.standard_normal(shape, np.float32) * np.float32(0.02)
                    delta = rng.standard_normal(shape, np.float32) * np.float32(2e-4)
                    base.write(pxd.raw_bytes(pxd.from_float32(weight, pxd.DType.BF16)))
                    tuned.write(pxd.raw_bytes(pxd.from_float32(weight + delta, pxd.DType.BF16)))


def read_and_write(inputs: Sequence[Path], target: Path, size: int) -> None:
    """Measure the floor: read every byte of the inputs, write `size` bytes and flush them to disk."""
    buffer = bytearray(CHUNK)
    for path in inputs:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with open(target, "wb", buffering=0) as file:
        for begin in range(0, size, CHUNK):  # noqa: FURB122  each write is one system call
            file.write(memoryview(buffer)[: min(CHUNK, size - begin)])
        os.fsync(file.fileno())
    target.unlink()


def run(*arguments: str) -> int:
    """Run `peraxis-tools` with these arguments. Returns its peak memory in bytes. Raises SystemExit if it fails."""
    process = subprocess.Popen([sys.executable, "-c", "from peraxis_tools.cli import main; main()", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(bench: Benchmark, folder: Path, *, repeat: int, bound: int) -> None:
    """Time both commands and their floors. bound: memory in bytes, for the note."""
    base = sorted((folder / "base").glob("*.safetensors"))
    tuned = sorted((folder / "fine-tuned").glob("*.safetensors"))
    delta, applied = folder / "delta.pxd", folder / "applied"
    commands = {
        "compress --fit none": (
            ["compress", str(folder / "base"), str(folder / "fine-tuned"), "-o", str(delta), "--fit", "none"],
            [*base, *tuned],
            lambda: delta.stat().st_size,
        ),
        "apply": (
            ["apply", str(folder / "base"), str(delta), "-o", str(applied)],
            [*base, delta],
            lambda: sum(path.stat().st_size for path in applied.glob("*.safetensors")),
        ),
    }
    for name, (command, inputs, written) in commands.items():
        peaks: list[int] = []
        timing = timed(
            lambda command=command, peaks=peaks: peaks.append(run(*command, "--overwrite", "--quiet")),
            repeat=repeat,
        )
        size = written()
        floor = timed(lambda inputs=inputs, size=size: read_and_write(inputs, folder / "floor", size), repeat=repeat)
        moved = sum(path.stat().st_size for path in inputs) + size
        reference = bench.add(f"read and write, {name}", floor, moved=moved)
        note = f"{timing.median / floor.median:.2f} x the floor; peak {max(peaks) / 1e9:.2f} of {bound / 1e9:.2f} GB"
        bench.add(name, Timing(timing.seconds), moved=moved, against=reference, note=note, peak_bytes=max(peaks))


def main() -> None:
    """Write the pair, measure, and remove the pair."""
    parser = arguments(__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of each checkpoint")
    parser.add_argument("--folder", type=Path, default=None, help="folder for the pair (default: a temporary folder)")
    options = parser.parse_args()
    specs = list(tensors(options.gigabytes))
    bound = 1_000_000_000 + 4 * max(spec.size for spec in specs)
    folder = Path(tempfile.mkdtemp(prefix="peraxis-", dir=options.folder))
    try:
        write_pair(folder, specs)
        bench = Benchmark("streaming", parameters={"checkpoint_bytes": sum(spec.size for spec in specs)})
        measure(bench, folder, repeat=options.repeat, bound=bound)
        bench.finish(options.json, options.plot)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
