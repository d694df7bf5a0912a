"""Time every step of a refined fit on one decoder block and compare each with the bound of its arithmetic.

Inputs are random with correlated columns. The steps are the compressor's own code (sums, Hessians, fits) and one
transformers layer, on the given device and in the given dtype. The bound of a step is its floating-point operations
divided by the throughput of one large matrix product in that dtype, which is measured first. A multiply-add counts as
two operations. n: tokens, d: d_in.

    forward   2 n (weights) + 2 n length width           once for the teacher, once for the student
    sums      2 n d^2 (5/8 G + E + 5/8 F of the validation tokens)              float32
    Hessian   d^3 (1/3 + 2) and, if signs are chosen, d^3 (1/3 + 1)             float64
    fit       d^2 (d_out (10.5 + 3.25 rounds) + 4 min(d_out, d)) of all rows, and 47.5 d^2 for each row that the
              candidates are tried on; symmetric products take 5/8             float32
              and d^3 / 3 for each fit of column scales                        float64
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from harness import Benchmark, Timing

from peraxis_tools.compress.fit.choice import fit_matrices
from peraxis_tools.compress.fit.fit import FitOptions, Matrix
from peraxis_tools.compress.fit.moments.sums import Moments, Statistics
from peraxis_tools.compress.shared_sizes import TRIAL_ROWS

__all__ = ["SHAPES", "Block", "one_block"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The shapes of a Llama block, and the number of blocks of the model."""

    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    layers: int

    def scaled(self, factor: int) -> Block:
        """Return the block with widths and heads divided by `factor`."""
        return Block(
            width=self.width // factor,
            mlp_width=self.mlp_width // factor,
            heads=max(1, self.heads // factor),
            kv_heads=max(1, self.kv_heads // factor),
            layers=self.layers,
        )

    @property
    def stages(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Stage -> (d_in, the d_out of every linear that reads this input)."""
        kv = self.width // self.heads * self.kv_heads
        return {
            "q, k, v": (self.width, (self.width, kv, kv)),
            "o": (self.width, (self.width,)),
            "gate, up": (self.width, (self.mlp_width, self.mlp_width)),
            "down": (self.mlp_width, (self.width,)),
        }

    @property
    def weights(self) -> int:
        """The number of elements of all linears."""
        return sum(d_in * sum(outs) for d_in, outs in self.stages.values())


SHAPES: Final = {
    "llama-3.1-8b": Block(width=4096, mlp_width=14336, heads=32, kv_heads=8, layers=32),
    "llama-3.2-1b": Block(width=2048, mlp_width=8192, heads=32, kv_heads=8, layers=16),
}
_HELD_OUT = 0.2
_BATCH = 8


class _Steps:
    """Times steps on a device and computes their bounds."""

    def __init__(self, bench: Benchmark, device: torch.device, repeat: int) -> None:
        self.bench, self.device, self.repeat = bench, device, repeat
        self.rates = {dtype: self._rate(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)}
        self.total, self.bound = 0.0, 0.0

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, action: Callable[[], object]) -> float:
        self._sync()
        begin = time.perf_counter()
        action()
        self._sync()
        return time.perf_counter() - begin

    def _rate(self, dtype: torch.dtype) -> float:
        """Return the operations per second of one large matrix product."""
        size = 8192 if self.device.type == "cuda" else 1024
        a, b = (torch.ones(size, size, dtype=dtype, device=self.device) for _ in range(2))
        return 2 * size**3 / min(self.seconds(lambda: a @ b) for _ in range(4))

    def record(self, name: str, make: Callable[[], Callable[[], object]], work: dict[torch.dtype, float]) -> None:
        """Time make()() `repeat` times after one run that compiles. work: operations by dtype."""
        make()()
        seconds = tuple(self.seconds(make()) for _ in range(self.repeat))
        bound = sum(amount / self.rates[dtype] for dtype, amount in work.items())
        timing = Timing(seconds)
        self.total += timing.median
        self.bound += bound
        self.bench.add(name, timing, note=f"{timing.median / bound:.1f} x its bound of {bound:.3g} s", bound=bound)


def one_block(
    bench: Benchmark,
    block: Block,
    *,
    samples: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    repeat: int,
) -> None:
    """Time the steps of one block and add them up. The last line estimates the time of all blocks of the model."""
    steps = _Steps(bench, device, repeat)
    tokens = samples * length
    forward = 2.0 * tokens * (block.weights + length * block.width)
    steps.record(
        "forward, teacher and student", lambda: _forward(block, samples, length, device, dtype), {dtype: 2 * forward}
    )
    options = FitOptions()
    for name, (d_in, outs) in block.stages.items():
        square = 2.0 * tokens * d_in**2 * (5 / 8 + 1 + _HELD_OUT * 5 / 8)
        steps.record(
            f"{name}: sums", lambda d_in=d_in: _sums(d_in, samples, length, device, dtype), {torch.float32: square}
        )
        statistics = _statistics(d_in, samples, length, device, dtype)
        single, double = _fit_work(d_in, outs, options)
        steps.record(
            f"{name}: fits",
            lambda outs=outs, given=statistics: _fits(outs, given, device, dtype, options),
            {torch.float32: single, torch.float64: double},
        )
    if device.type == "cuda":
        bench.parameters["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    whole = block.layers * steps.total
    note = f"{block.layers} blocks: {whole / 60:.1f} minutes; bound {block.layers * steps.bound / 60:.1f}"
    bench.add("one block", Timing((steps.total,)), note=note, bound=steps.bound, whole=whole)


def _forward(block: Block, samples: int, length: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=block.width,
        intermediate_size=block.mlp_width,
        num_attention_heads=block.heads,
        num_key_value_heads=block.kv_heads,
        attn_implementation="sdpa",
    )
    layer = LlamaDecoderLayer(config, 0).to(device=device, dtype=dtype).eval()
    hidden = torch.randn(_BATCH, length, block.width, device=device, dtype=dtype)
    rotary = LlamaRotaryEmbedding(config).to(device)(hidden, torch.arange(length, device=device)[None])

    @torch.no_grad()
    def run() -> None:
        for _ in range(2):
            for start in range(0, samples, _BATCH):
                part = hidden[: min(_BATCH, samples - start)]
                layer(part, position_embeddings=rotary, attention_mask=None)

    return run


def _inputs(d_in: int, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the inputs of student and teacher [tokens, d_in], with columns correlated with their neighbours."""
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, d_in, generator=g, device=device)
    x = (x + 0.7 * x.roll(1, dims=1) + 0.3 * x.roll(2, dims=1)).to(dtype)
    return x, (x + 0.05 * torch.randn(tokens, d_in, generator=g, device=device)).to(dtype)


def _sums(d_in: int, samples: int, length: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Statistics]:
    tokens = min(_BATCH, samples) * length
    x, teacher = _inputs(d_in, tokens, device, dtype)
    fit, held_out = (
        Moments.zeros(d_in, paired=True, validates=validates, grid=2.0**-30, device=device)
        for validates in (False, True)
    )
    judging = round(_HELD_OUT * samples)

    def run() -> Statistics:
        for moments, count in ((fit, samples - judging), (held_out, judging)):
            for start in range(0, count, _BATCH):
                rows = slice(0, min(_BATCH, count - start) * length)
                moments.add(x[rows], teacher[rows])
        return Statistics(fit=fit, validation=held_out)

    return run


def _statistics(d_in: int, samples: int, length: int, device: torch.device, dtype: torch.dtype) -> Statistics:
    return _sums(d_in, samples, length, device, dtype)()


def _fits(
    outs: Sequence[int], statistics: Statistics, device: torch.device, dtype: torch.dtype, options: FitOptions
) -> Callable[[], object]:
    g = torch.Generator(device).manual_seed(1)
    matrices = []
    for d_out in outs:
        shape = (d_out, len(statistics.fit.G))
        base = 0.02 * torch.randn(shape, generator=g, device=device)
        tuned = base + 0.002 * torch.randn(shape, generator=g, device=device)
        matrices.append(Matrix(base=base, fine_tuned=tuned, dtype=dtype))

    def run() -> object:
        # A fit consumes its statistics. A copy takes little time beside it.
        given = Statistics(fit=_copy(statistics.fit), validation=_copy(statistics.validation))
        return fit_matrices(matrices, statistics=given, options=options)

    return run


def _copy(moments: Moments) -> Moments:
    copied = Moments.zeros(len(moments.G), paired=True, validates=False, grid=moments.grid, device=moments.G.device)
    copied.merge(moments)
    return copied


def _fit_work(d_in: int, outs: Sequence[int], options: FitOptions) -> tuple[float, float]:
    """Return the operations of the fits of a stage in float32 and in float64."""
    # In units of d_in^2; a product takes 2 a row. The sweeps over signs are no matrix products, so this is a bound.
    whole = 10.5 + 3.25 * options.rounds
    shift = 4  # by the factor of H^-1
    trial = 47.5  # of the candidates, which are tried on some rows
    some = [len(range(0, d_out, max(1, d_out // TRIAL_ROWS))) for d_out in outs]
    single = whole * sum(outs) + shift * sum(min(d_out, d_in) for d_out in outs) + trial * sum(some)
    solved = 2 * sum(min(rows, d_in) for rows in some)
    cubes = 2 + len(outs) * (options.rounds + 4) / 3
    return single * float(d_in) ** 2, float(d_in) ** 2 * (cubes * d_in + solved)
