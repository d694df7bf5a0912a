"""Time the swap of a variant from every tier beside loading the full checkpoint from the same tier.

    python benchmarks/load.py --json load.json --plot load.svg --check         8B shapes on a GPU, small ones on a CPU

One run measures the copy bandwidth of the device and of the link, the bandwidth of reading the file from the page
cache, and the apply kernels. Then it times swaps from device memory, pinned memory, the page cache and a cold file, the
same file through safetensors, and the full BF16 checkpoint through safetensors and, if they are installed,
fastsafetensors and runai-model-streamer. The minimum times of a swap follow from its bytes:

    apply     2 x weights + payload, at the copy bandwidth of the device
    link      payload, at the bandwidth of the link
    read      payload, at the bandwidth of the page cache into pinned memory

The floor of a swap is apply in device memory, else the larger of apply and link. The limit of a swap is the largest of
the times that its tier needs. With --check the exit code is 1 if a bound is missed; bounds are checked only on a GPU.
Weights and masks are random, because the bytes of a swap do not depend on their values.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from harness import Benchmark, Result, Timing, arguments, timed
from make_artifact import LLAMA_8B, Shapes
from safetensors.torch import load_file, save_file
from torch import Tensor

import peraxis_format as pf
from peraxis_format.thread_pool import ThreadPool
from peraxis_format.torch import VariantSwitch
from peraxis_format.torch.ring import DEPTH
from peraxis_format.torch.swap.payload import read_transfer

PRESETS = {
    "8b": LLAMA_8B,
    "1b": Shapes(layers=16, width=2048, mlp=8192, key_value=512, vocabulary=128256),
    "tiny": Shapes(layers=1, width=64, mlp=176, key_value=32, vocabulary=256),
    "small": Shapes(layers=4, width=1024, mlp=2816, key_value=256, vocabulary=8192),
}
# Upper bounds of a swap relative to its floor, by tier. Lower bounds: the apply kernels' share of the copy bandwidth,
# and the speed of a swap relative to the fastest full load.
OF_FLOOR = {"gpu": 1.15, "pinned": 1.25, "page cache": 2.0}
KERNEL_OF_COPY, OVER_FULL_LOAD = 0.9, 12.0


def random_base(shapes: Shapes, device: torch.device) -> dict[str, Tensor]:
    """Return random BF16 weights on the device, with the standard deviation of a trained model's."""
    torch.manual_seed(0)
    return {
        name: torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
        for name, shape in shapes.tensors()
    }


def bits_of(tensor: Tensor) -> pf.Array:
    """Return the bit patterns of BF16 weights as uint16 on the host."""
    return tensor.detach().cpu().view(torch.int16).numpy().view(np.uint16)


def base_refs(base: Mapping[str, Tensor]) -> dict[str, pf.BaseRef]:
    """Return the base references of a delta. The digests are computed on all processors."""

    def ref(tensor: Tensor) -> pf.BaseRef:
        return pf.BaseRef(dtype=pf.DType.BF16, shape=tuple(tensor.shape), sha256=pf.digest_of(bits_of(tensor)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(base, pool.map(ref, base.values()), strict=True))


def random_module(name: str, tensor: Tensor, ref: pf.BaseRef, rng: np.random.Generator) -> pf.ModuleDelta:
    """Return a `sign` module with row scales for a matrix, and an exact module for a vector."""
    common = {"name": name, "shape": ref.shape, "dtype": pf.DType.BF16, "base": ref}
    if len(ref.shape) == 1:
        return pf.ModuleDelta(**common, encoding=pf.Encoding.FULL, full=bits_of(tensor).copy())
    mask = np.frombuffer(rng.bytes(ref.shape[0] * pf.mask_width(ref.shape[1])), np.uint8)
    row, exponent = pf.encode_scales(rng.uniform(1e-4, 3e-4, ref.shape[0]))
    component = pf.Component(axis=pf.Axis.ROW, exponent=exponent, mask=mask.reshape(ref.shape[0], -1), row=row)
    return pf.ModuleDelta(**common, encoding=pf.Encoding.SIGN, components=(component,))


def write_delta(path: Path, base: Mapping[str, Tensor], refs: Mapping[str, pf.BaseRef], seed: int = 0) -> Path:
    """Write a delta of every tensor. Widths are multiples of 8. Returns the path."""
    rng = np.random.default_rng(seed)
    with pf.DeltaWriter(path, base=pf.Identity(id="random"), fine_tuned=pf.Identity(id=f"tuned-{seed}")) as writer:
        for name, tensor in base.items():
            writer.add(random_module(name, tensor, refs[name], rng))
        writer.finish()
    return path


def drop_cached(path: Path) -> None:
    """Drop a file's pages from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def wait(device: torch.device) -> Callable[[], None]:
    """Return the function that waits for the device."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


class Run:
    """One run of the benchmark on one device."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.device = torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self.repeat, self.few = options.repeat, options.loads
        self.sync = wait(self.device)
        self.folder = folder
        self.base = random_base(PRESETS[options.preset], self.device)
        self.weights = sum(t.nbytes for t in self.base.values())
        self.delta = write_delta(folder / "delta.pxd", self.base, base_refs(self.base))
        self.payload = self.delta.stat().st_size
        sizes = {"weights": self.weights, "delta": self.payload}
        self.bench = Benchmark("load", parameters={"preset": options.preset, "device": str(self.device), **sizes})
        self.floors: dict[str, float] = {}
        self.medians: dict[str, float] = {}

    def timed(self, action: Callable[[], object], repeat: int | None = None) -> Timing:
        """Time an action whose file is in the page cache."""
        return timed(action, repeat=repeat or self.repeat, sync=self.sync)

    def cold(self, action: Callable[[], object], path: Path) -> Timing:
        """Time an action whose file is dropped from the page cache before each repetition."""
        seconds: list[float] = []
        for _ in range(self.few):
            drop_cached(path)
            seconds.extend(timed(action, repeat=1, warmup=0, sync=self.sync).seconds)
        return Timing(tuple(seconds))

    def copies(self) -> Result:
        """Measure the bandwidths of device and link and compute the floors. Returns the result of the device copy."""
        size = min(self.weights, 2 << 30)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        device = self.bench.add("device copy", self.timed(lambda: target.copy_(source)), moved=2 * size)
        host = torch.empty(self.payload, dtype=torch.uint8, pin_memory=self.cuda)
        there = torch.empty(self.payload, dtype=torch.uint8, device=self.device)
        action = self.timed(lambda: there.copy_(host, non_blocking=True))
        link = self.bench.add("link copy (pinned)", action, moved=self.payload)
        assert device.rate is not None
        self.floors["apply"] = (2 * self.weights + self.payload) / device.rate
        self.floors["link"] = link.median
        return device

    def swaps(self, copy: Result) -> None:
        """Time the apply kernels, the reads, and swaps from every tier relative to their floors."""
        tiers = {"gpu": "gpu", "pinned": "pinned", "page cache": "file"}
        if not self.cuda:
            del tiers["gpu"]
        with VariantSwitch(self.base) as switch:
            for residency in tiers.values():
                # Each variant is added twice, so that a swap always comes from another variant, not from the base.
                for name in (residency, f"{residency} again"):
                    switch.add(name, self.delta, residency)
            self._kernels(switch, next(iter(tiers.values())), copy)
            self._reads(switch)

            def swap(residency: str) -> Callable[[], object]:
                return lambda: switch.use(residency if switch.current != residency else f"{residency} again")

            for tier, residency in tiers.items():
                self._swap(tier, self.timed(swap(residency)))
            self._swap("cold file", self.cold(swap("file"), self.delta))

    def _kernels(self, switch: VariantSwitch, name: str, copy: Result) -> None:
        registered = switch._registry.find(name)
        payload, engine = registered.payload, registered.engine
        get = payload.buffer if payload.residency == "gpu" else payload.host

        def run() -> None:
            for index, transfer in enumerate(payload.transfers):
                engine.write(transfer, get(index))

        moved = 2 * self.weights + self.payload
        timing = self.timed(run)
        switch.use(name, overwrite=True)  # the switch does not know that the weights were written
        found = self.bench.add("apply kernels alone", timing, moved=moved, against=copy)
        if self.cuda:
            self.bench.check("apply kernels, of the copy bandwidth", found.ratio or 0.0, at_least=KERNEL_OF_COPY)

    def _reads(self, switch: VariantSwitch) -> None:
        ring, payload = switch._registry.ring, switch._registry.find("file").payload
        assert ring is not None

        def run() -> None:
            for index, transfer in enumerate(payload.transfers):
                slot = ring.host[index % DEPTH]
                read_transfer(payload.delta, transfer, slot, workers)

        with ThreadPool() as workers:
            timing = self.timed(run)
        self.bench.add("read of the page cache into the ring", timing, moved=self.payload)
        self.floors["read"] = timing.median

    def _swap(self, tier: str, timing: Timing) -> None:
        needs = {"gpu": ["apply"], "pinned": ["apply", "link"]}.get(tier, ["apply", "link", "read"])
        limit = max(needs, key=self.floors.__getitem__)
        floor = self.floors["apply"] if tier == "gpu" else max(self.floors["apply"], self.floors["link"])
        self.medians[tier] = timing.median
        note = f"{timing.median / floor:.2f} of its floor, limited by {limit}"
        self.bench.add(
            f"swap from {tier}", timing, moved=2 * self.weights + self.payload, note=note, floor=floor, limit=limit,
            of_floor=timing.median / floor,
        )  # fmt: skip
        if self.cuda and tier in OF_FLOOR:
            limits = f"limited by {limit} ({1e3 * self.floors[limit]:.1f} ms); p95 {1e3 * timing.percentile(95):.1f} ms"
            self.bench.check(
                f"swap from {tier}, of its floor", timing.median / floor, at_most=OF_FLOOR[tier], note=limits
            )

    def _load(self, path: Path) -> None:
        """Load a file to the device. On the CPU safetensors only maps the file, so the tensors are copied."""
        loaded = load_file(path, device=str(self.device))
        if not self.cuda:
            for tensor in loaded.values():
                tensor.clone()

    def loads(self) -> None:
        """Time other loaders on the same file and on the full checkpoint."""
        self.bench.add("the same file through safetensors", self.timed(lambda: self._load(self.delta), self.few))
        full = self.folder / "model.safetensors"
        save_file({name: tensor.cpu() for name, tensor in self.base.items()}, full)
        loaders = {"safetensors": lambda: self._load(full), **dict(others(full, self.device))}
        for tier, measure in (
            ("page cache", lambda load: self.timed(load, self.few)),
            ("cold file", lambda load: self.cold(load, full)),
        ):
            found = [
                self.bench.add(f"full checkpoint through {name}, {tier}", measure(load))
                for name, load in loaders.items()
            ]
            best = min(found, key=lambda result: result.median)
            if self.cuda:
                faster = best.median / self.medians[tier]
                self.bench.check(
                    f"swap from {tier}, times as fast as the best full load", faster, at_least=OVER_FULL_LOAD,
                    note=best.name,
                )  # fmt: skip


def others(full: Path, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the other loaders that are installed, if the device is a CUDA device."""
    if device.type != "cuda":
        return
    try:
        from fastsafetensors import fastsafe_open
    except ImportError:
        pass
    else:

        def fast() -> None:
            with fastsafe_open(filenames=[str(full)], nogds=True, device=str(device)) as file:
                for key in file.keys():  # noqa: SIM118  the file is not a mapping
                    file.get_tensor(key)

        yield "fastsafetensors", fast
    try:
        from runai_model_streamer import SafetensorsStreamer
    except ImportError:
        pass
    else:

        def streamed() -> None:
            with SafetensorsStreamer() as streamer:
                streamer.stream_file(str(full))
                for _, tensor in streamer.get_tensors():
                    tensor.to(device)

        yield "runai-model-streamer", streamed


@contextmanager
def work_folder(path: Path | None) -> Iterator[Path]:
    """Yield the given folder, or a temporary one."""
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def main() -> int:
    """Measure and write the figures. Returns 1 if --check is given and a bound is missed."""
    parser = arguments(__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", choices=sorted(PRESETS), default="8b" if cuda else "small")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--folder", type=Path, default=None, help="where to write the files (default: temporary)")
    parser.add_argument("--loads", type=int, default=3, help="number of repetitions of full loads and cold loads")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    options = parser.parse_args()
    with work_folder(options.folder) as folder, torch.no_grad():
        run = Run(options, folder)
        run.swaps(run.copies())
        run.loads()
        met = run.bench.finish(options.json, options.plot)
    return 0 if met or not options.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
