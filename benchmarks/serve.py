"""Time decode and prefill with 1 to 32 variants in one batch, beside merged models and beside the base.

    python benchmarks/serve.py --json serve.json --plot serve.svg --check       8B shapes on a GPU, small ones on a CPU

The model is a stack of the linears of decoder layers. T sequences of one row (decode) or of --prompt rows (prefill)
take these passes and bytes per weight:

    base alone      one pass, T sequences                       2
    served          one pass, each sequence its own variant     2 + T / 8
    merged          T passes, one for each merged model         2 T

roofline: the time that the bytes of a decode pass need at the copy bandwidth of the device in the same run, divided by
the time of the pass. On a GPU all decode passes are CUDA graphs, so that kernels are compared without Python. All
merged passes use one set of weights: they read as many bytes as T copies, and the weights are larger than any cache.
With --check the exit code is 1 if a bound is missed; bounds are checked only on a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from harness import Benchmark, Timing, arguments, timed, timed_together
from load import PRESETS, base_refs, wait, write_delta
from make_artifact import Shapes
from torch import Tensor, nn

from peraxis_format.torch import Served
from peraxis_format.torch.serve.api import serve

SIXTEEN_OVER_MERGED, ONE_OF_BASE = 4.0, 1.35


class Stack(nn.Module):
    """The linears of decoder layers, without attention, activations and norms."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        hidden, kv, mlp = shapes.width, shapes.key_value, shapes.mlp
        for _ in range(shapes.layers):
            sizes = {"q": (hidden, hidden), "k": (hidden, kv), "v": (hidden, kv), "o": (hidden, hidden),
                     "gate": (hidden, mlp), "up": (hidden, mlp), "down": (mlp, hidden)}  # fmt: skip
            self.layers.append(nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()}))

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, rows, hidden]; so is the result. Every linear is used once; each layer normalizes its output."""
        for layer in self.layers:
            x = x + layer["o"](layer["q"](x)) + (layer["k"](x).sum() + layer["v"](x).sum()) * 0
            x = x + layer["down"](layer["gate"](x) * layer["up"](x))
            x = x / (x.float().square().mean(-1, keepdim=True).sqrt() + 1e-6).to(x.dtype)
        return x


def stack_of(shapes: Shapes, device: torch.device) -> Stack:
    """Return a stack with random BF16 weights, which are created on the device."""
    with torch.device("meta"):
        model = Stack(shapes).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def write_variants(folder: Path, model: nn.Module, count: int) -> dict[str, Path]:
    """Write `count` deltas of the same base with different masks. Returns variant name -> path."""
    base = {name: tensor.detach() for name, tensor in model.named_parameters()}
    refs = base_refs(base)
    return {str(i): write_delta(folder / f"{i}.pxd", base, refs, seed=i) for i in range(count)}


def mixed(served: Served, model: nn.Module, x: Tensor, variants: Sequence[int]) -> Callable[[], Tensor]:
    """Return an action that runs one pass with a variant for each sequence."""

    def run() -> Tensor:
        with served.using(list(variants)):
            return model(x)

    return run


def passes(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return an action that runs one pass for each sequence, as merged models would."""

    def run() -> None:
        for i in range(len(x)):
            model(x[i : i + 1])

    return run


def graphed(action: Callable[[], object]) -> Callable[[], None]:
    """Capture an action as a CUDA graph. Warm-up runs create tables and compile kernels before the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def decoders(served: Served, model: nn.Module, x: Tensor, variants: Sequence[int]) -> list[Callable[[], object]]:
    """Return the actions base alone, served and merged; on a CUDA device they are CUDA graphs."""
    if not x.is_cuda:
        return [lambda: model(x), mixed(served, model, x, variants), passes(model, x)]
    alone, merged = graphed(lambda: model(x)), graphed(passes(model, x))
    with served.using(list(variants)):  # the tables of this batch are made once
        ours = graphed(lambda: model(x))
    return [alone, ours, merged]


def copied(weights: int, device: torch.device, repeat: int) -> Timing:
    """Time the copy of `weights` BF16 weights on the device."""
    source = torch.zeros(weights, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return timed(lambda: target.copy_(source), repeat=repeat, sync=wait(device))


class Run:
    """One run of the benchmark on one device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.shapes = replace(PRESETS[options.preset], layers=options.layers)
        self.model = stack_of(self.shapes, self.device)
        self.weights = sum(parameter.numel() for parameter in self.model.parameters())
        parameters = {"preset": options.preset, "layers": options.layers, "weights": self.weights}
        self.bench = Benchmark(
            "serve", parameters={**parameters, "device": str(self.device), "prompt": options.prompt}
        )  # fmt: skip
        copy = copied(self.weights, self.device, options.repeat)
        self.rate = self.bench.add("device copy", copy, moved=4 * self.weights).rate or 1.0

    def measure(self, served: Served, kind: str, length: int, count: int) -> None:
        """Measure one number of variants. kind: decode or prefill. length: rows per sequence."""
        x = torch.randn(count, length, self.shapes.width, device=self.device).to(torch.bfloat16)
        if kind == "decode":
            actions = decoders(served, self.model, x, range(count))
        else:
            actions = [lambda: self.model(x), mixed(served, self.model, x, range(count)), passes(self.model, x)]
        alone, ours, merged = timed_together(actions, repeat=self.options.repeat, sync=wait(self.device))
        first = self.bench.add(f"{kind}, {count}: base alone", alone)
        share = self.weights * (2 + count / 8) / self.rate / ours.median
        note = f"{share:.2f} of the roofline" if kind == "decode" else ""
        self.bench.add(f"{kind}, {count}: served", ours, against=first, note=note, roofline=share)
        faster = merged.median / ours.median
        note = f"served is {faster:.2f} times as fast"
        self.bench.add(f"{kind}, {count}: merged passes", merged, against=first, note=note)
        if self.device.type == "cuda" and kind == "decode":
            self._check(count, alone.median, ours, faster, share)

    def _check(self, count: int, alone: float, ours: Timing, faster: float, share: float) -> None:
        note = f"{share:.2f} of the roofline; p95 {1e3 * ours.percentile(95):.2f} ms"
        if count == 16:
            self.bench.check(
                "decode, 16 variants, times as fast as merged passes", faster, at_least=SIXTEEN_OVER_MERGED, note=note
            )
        if count == 1:
            self.bench.check(
                "decode, 1 variant, times the base alone", ours.median / alone, at_most=ONE_OF_BASE, note=note
            )


def main() -> int:
    """Measure and write the figures. Returns 1 if --check is given and a bound is missed."""
    parser = arguments(__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", choices=sorted(PRESETS), default="8b" if cuda else "small")
    parser.add_argument("--layers", type=int, default=4 if cuda else 1)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--prompt", type=int, default=512 if cuda else 64)
    parser.add_argument("--variants", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32] if cuda else [1, 4, 16])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        run = Run(options)
        with serve(run.model, write_variants(Path(name), run.model, max(options.variants))) as served:
            for kind, length in (("decode", 1), ("prefill", options.prompt)):
                for count in options.variants:
                    run.measure(served, kind, length, count)
        met = run.bench.finish(options.json, options.plot)
    return 0 if met or not options.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
