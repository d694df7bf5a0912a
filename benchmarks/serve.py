"""Decode and prefill with 1 to 32 variants in one batch, beside merged copies and beside the base alone.

    python benchmarks/serve.py --json serve.json --plot serve.svg

The model is a stack of the linears of decoder layers. For T variants, one row (decode) or `--prompt` rows (prefill)
each:

    base alone      one pass, T sequences                      2 bytes a weight
    served          one pass, each sequence its own variant    2 + T / 8 bytes a weight
    merged          T passes, one for each merged model        2 T bytes a weight

roofline: the bytes that a decode pass needs at the device's copy bandwidth of the same run, over the time it took.
Merged passes all use one set of weights: what they read is as large as with T copies, and larger than any cache.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from harness import Benchmark, Timing, arguments, timed, timed_together
from load import PRESETS, random_module, wait
from torch import Tensor, nn

import peraxis_format as pf
from peraxis_format.torch import Served, serve


class Stack(nn.Module):
    """The linears of decoder layers, without what lies between them."""

    def __init__(self, layers: int, hidden: int, mlp: int, kv: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(layers):
            sizes = {"q": (hidden, hidden), "k": (hidden, kv), "v": (hidden, kv), "o": (hidden, hidden),
                     "gate": (hidden, mlp), "up": (hidden, mlp), "down": (mlp, hidden)}  # fmt: skip
            self.layers.append(nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()}))

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, rows, hidden]. Every linear is used once; the size of the values stays what it is."""
        for layer in self.layers:
            x = x + layer["o"](layer["q"](x)) + (layer["k"](x).sum() + layer["v"](x).sum()) * 0
            x = x + layer["down"](layer["gate"](x) * layer["up"](x))
            x = x / (x.float().square().mean(-1, keepdim=True).sqrt() + 1e-6).to(x.dtype)
        return x


def write_variants(folder: Path, model: nn.Module, count: int) -> dict[str, Path]:
    """Deltas of the same base, with masks of their own."""
    paths = {}
    for i in range(count):
        paths[str(i)] = folder / f"{i}.pxd"
        rng = np.random.default_rng(i)
        with pf.DeltaWriter(
            paths[str(i)], base=pf.Identity(id="random"), fine_tuned=pf.Identity(id=str(i))
        ) as writer:  # fmt: skip
            for name, tensor in model.named_parameters():
                writer.add(random_module(name, tensor.detach(), rng))
            writer.finish()
    return paths


def mixed(served: Served, model: nn.Module, x: Tensor, variants: Sequence[int]) -> Callable[[], Tensor]:
    """One pass, each sequence its own variant."""

    def run() -> Tensor:
        with served.using(list(variants)):
            return model(x)

    return run


def passes(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One pass for each sequence: what merged models would do."""

    def run() -> None:
        for i in range(len(x)):
            model(x[i : i + 1])

    return run


def copied(weights: int, device: torch.device, repeat: int) -> Timing:
    """Copies of as many BF16 weights."""
    source = torch.zeros(weights, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return timed(lambda: target.copy_(source), repeat=repeat, sync=wait(device))


def measure(options: argparse.Namespace, folder: Path) -> Benchmark:
    """Every count of variants, decode and prefill."""
    device = torch.device(options.device)
    sync = wait(device)
    sizes = {**PRESETS[options.preset], "layers": options.layers}
    del sizes["vocab"]
    torch.manual_seed(0)
    model = Stack(**sizes).to(torch.bfloat16).to(device).eval()
    weights = sum(parameter.numel() for parameter in model.parameters())
    parameters = {"preset": options.preset, "layers": options.layers, "weights": weights, "device": str(device)}
    bench = Benchmark("serve", parameters={**parameters, "prompt": options.prompt})
    copy = bench.add("device copy", copied(weights, device, options.repeat), moved=4 * weights)
    paths = write_variants(folder, model, max(options.variants))
    with serve(model, paths) as served:
        for kind, length in (("decode", 1), ("prefill", options.prompt)):
            for count in options.variants:
                x = torch.randn(count, length, sizes["hidden"], device=device).to(torch.bfloat16)
                actions = [lambda x=x: model(x), mixed(served, model, x, range(count)), passes(model, x)]
                alone, ours, merged = timed_together(actions, repeat=options.repeat, sync=sync)
                first = bench.add(f"{kind}, {count}: base alone", alone)
                needed = weights * (2 + count / 8) / (copy.rate or 1.0)
                note = f"{needed / ours.median:.2f} of the roofline" if length == 1 else ""
                bench.add(f"{kind}, {count}: served", ours, against=first, note=note, roofline=needed / ours.median)
                bench.add(
                    f"{kind}, {count}: merged passes", merged, against=first,
                    note=f"served is {merged.median / ours.median:.2f} times as fast",
                )  # fmt: skip
    return bench


def main() -> int:
    """Measure and write."""
    parser = arguments(__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", choices=sorted(PRESETS), default="8b" if cuda else "small")
    parser.add_argument("--layers", type=int, default=4 if cuda else 1)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--prompt", type=int, default=512 if cuda else 64)
    parser.add_argument("--variants", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32] if cuda else [1, 4])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        measure(options, Path(name)).finish(options.json, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
