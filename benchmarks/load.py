"""Swapping a variant, from every tier, beside loading the full checkpoint from the same tier.

    python benchmarks/load.py --preset 8b --json load.json --plot load.svg        on a GPU
    python benchmarks/load.py --preset small                                      anywhere

Measured in one run: the device's copy bandwidth, the link's, then ours from device memory, pinned memory, the page
cache and a cold file; the same file through safetensors; the full BF16 checkpoint through safetensors and, where they
are installed, fastsafetensors and runai-model-streamer. The floor of a swap is what its bytes need:

    apply     2 x weights + payload at the device's copy bandwidth
    link      payload at the link's bandwidth                       swap >= max(apply, link)

Weights and masks are random: neither their values nor the fit change what a swap moves.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from harness import Benchmark, Result, Timing, arguments, timed
from safetensors.torch import load_file, save_file
from torch import Tensor

import peraxis_format as pf
from peraxis_format.torch import VariantSwitch

PRESETS = {
    "8b": {"layers": 32, "hidden": 4096, "mlp": 14336, "kv": 1024, "vocab": 128256},
    "1b": {"layers": 16, "hidden": 2048, "mlp": 8192, "kv": 512, "vocab": 128256},
    "tiny": {"layers": 1, "hidden": 64, "mlp": 176, "kv": 32, "vocab": 256},
    "small": {"layers": 4, "hidden": 1024, "mlp": 2816, "kv": 256, "vocab": 8192},
}


def shapes(layers: int, hidden: int, mlp: int, kv: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama of these sizes, untied."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        name = f"model.layers.{i}"
        out |= {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_proj.weight": (hidden, hidden),
            f"{name}.self_attn.k_proj.weight": (kv, hidden),
            f"{name}.self_attn.v_proj.weight": (kv, hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, hidden),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.mlp.gate_proj.weight": (mlp, hidden),
            f"{name}.mlp.up_proj.weight": (mlp, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, mlp),
        }
    return out | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def random_base(wanted: Mapping[str, tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
    """BF16 weights of a trained model's size, on the device."""
    torch.manual_seed(0)
    return {
        name: torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
        for name, shape in wanted.items()
    }


def random_module(name: str, tensor: Tensor, rng: np.random.Generator) -> pf.ModuleDelta:
    """Matrices `sign` with row scales, vectors exact."""
    array = tensor.cpu().view(torch.int16).numpy().view(np.uint16)
    shape = tuple(tensor.shape)
    base = pf.BaseRef(dtype=pf.DType.BF16, shape=shape, sha256=hashlib.sha256(pf.raw_bytes(array)).hexdigest())
    common = {"name": name, "shape": shape, "dtype": pf.DType.BF16, "base": base}
    if len(shape) == 1:
        return pf.ModuleDelta(**common, encoding=pf.Encoding.FULL, full=array.copy())
    mask = rng.integers(0, 256, (shape[0], pf.mask_width(shape[1])), np.uint8)
    row, exponent = pf.encode_scales(rng.uniform(1e-4, 3e-4, shape[0]))
    component = pf.Component(axis=pf.Axis.ROW, exponent=exponent, mask=mask, row=row)
    return pf.ModuleDelta(**common, encoding=pf.Encoding.SIGN, components=(component,))


def write_delta(path: Path, base: Mapping[str, Tensor]) -> None:
    """A delta of every tensor."""
    rng = np.random.default_rng(0)
    with pf.DeltaWriter(
        path, base=pf.Identity(id="random"), fine_tuned=pf.Identity(id="random-tuned")
    ) as writer:  # fmt: skip
        for name, tensor in base.items():
            writer.add(random_module(name, tensor, rng))
        writer.finish()


def drop_cached(path: Path) -> None:
    """Make the kernel forget a file's pages."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def wait(device: torch.device) -> Callable[[], None]:
    """What waits for the device."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


class Run:
    """One run of the benchmark on one device."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.device = torch.device(options.device)
        self.repeat = options.repeat
        self.sync = wait(self.device)
        self.folder = folder
        self.base = random_base(shapes(**PRESETS[options.preset]), self.device)
        self.weights = sum(t.numel() * 2 for t in self.base.values())
        self.delta = folder / "delta.pxd"
        write_delta(self.delta, self.base)
        self.payload = self.delta.stat().st_size
        parameters = {
            "preset": options.preset,
            "weights": self.weights,
            "delta": self.payload,
            "device": str(self.device),
        }
        self.bench = Benchmark("load", parameters=parameters)

    def timed(self, action: Callable[[], object]) -> Timing:
        """A warm action."""
        return timed(action, repeat=self.repeat, sync=self.sync)

    def cold(self, action: Callable[[], object], path: Path) -> Timing:
        """An action whose file is out of the page cache each time."""
        seconds: list[float] = []
        for _ in range(max(3, self.repeat // 3)):
            drop_cached(path)
            seconds.extend(timed(action, repeat=1, warmup=0, sync=self.sync).seconds)
        return Timing(tuple(seconds))

    def copies(self) -> tuple[Result, Result]:
        """The bandwidth of the device and that of the link."""
        size = min(self.weights, 2 << 30)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        device = self.bench.add("device copy", self.timed(lambda: target.copy_(source)), moved=2 * size)
        host = torch.empty(self.payload, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        there = torch.empty(self.payload, dtype=torch.uint8, device=self.device)
        link = self.bench.add(
            "link copy (pinned)", self.timed(lambda: there.copy_(host, non_blocking=True)), moved=self.payload
        )
        return device, link

    def floors(self, device: Result, link: Result) -> tuple[float, float]:
        """Seconds that a swap's traffic needs on the device, and on the link."""
        assert device.rate is not None
        assert link.rate is not None
        return (2 * self.weights + self.payload) / device.rate, self.payload / link.rate

    def swaps(self, apply_floor: float, link_floor: float) -> None:
        """Ours, from every tier, as a fraction of the floor."""
        tiers = ["gpu"] if self.device.type == "cuda" else []
        with VariantSwitch(self.base) as switch:
            for residency in (*tiers, "pinned", "file"):
                # Twice: what is timed is a swap from another variant, and no return to the base.
                for name in (residency, f"{residency} again"):
                    switch.add(name, self.delta, residency)

            def swap(tier: str) -> Callable[[], object]:
                return lambda: switch.use(tier if switch.current != tier else f"{tier} again")

            for tier in (*tiers, "pinned", "file"):
                floor = apply_floor if tier == "gpu" else max(apply_floor, link_floor)
                self._swap(f"swap from {'page cache' if tier == 'file' else tier}", self.timed(swap(tier)), floor)
            self._swap("swap from a cold file", self.cold(swap("file"), self.delta), max(apply_floor, link_floor))

    def _swap(self, name: str, timing: Timing, floor: float) -> None:
        self.bench.add(
            name, timing, moved=2 * self.weights + self.payload, note=f"{timing.median / floor:.2f} of its floor",
            floor=floor, of_floor=timing.median / floor,
        )  # fmt: skip

    def _load(self, path: Path) -> None:
        """To the device; on the CPU, where safetensors only maps the file, into memory of its own."""
        loaded = load_file(path, device=str(self.device))
        if self.device.type == "cpu":
            for tensor in loaded.values():
                tensor.clone()

    def loads(self) -> None:
        """What others need to load the same file, and the whole checkpoint."""
        self.bench.add("the same file through safetensors", self.timed(lambda: self._load(self.delta)))
        full = self.folder / "model.safetensors"
        save_file({name: tensor.cpu() for name, tensor in self.base.items()}, full)
        best = self.bench.add(
            "full checkpoint through safetensors, page cache",
            self.timed(lambda: self._load(full)),
        )
        self.bench.add(
            "full checkpoint through safetensors, cold",
            self.cold(lambda: self._load(full), full),
        )
        for name, loader in others(full, self.device):
            found = self.bench.add(f"full checkpoint through {name}, page cache", self.timed(loader))
            best = min(best, found, key=lambda result: result.median)
        ours = next(r for r in self.bench.results if r.name == "swap from page cache")
        self.bench.add(
            "swap from page cache, again", Timing((ours.median,)), against=best, note="speed over the best full load"
        )


def others(full: Path, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Other loaders, where they are installed and there is a CUDA device for them."""
    if device.type != "cuda":
        return
    try:
        from fastsafetensors import fastsafe_open
    except ImportError:
        pass
    else:

        def fast() -> None:
            with fastsafe_open(filenames=[str(full)], nogds=True, device=str(device)) as file:
                for key in file.keys():  # noqa: SIM118  no mapping
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
    """A given folder, or one that goes away."""
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def main() -> int:
    """Measure and write."""
    parser = arguments(__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", choices=sorted(PRESETS), default="8b" if cuda else "small")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--folder", type=Path, default=None, help="where to write the files (default: temporary)")
    options = parser.parse_args()
    with work_folder(options.folder) as folder, torch.no_grad():
        run = Run(options, folder)
        run.swaps(*run.floors(*run.copies()))
        run.loads()
        run.bench.finish(options.json, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
