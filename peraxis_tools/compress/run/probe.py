"""How long this machine takes now for the operations of a run: a layer, a step of generation, a fit, a trained weight.

A layer of the model's own class runs on random values, as many at a time as the run has, so that what Python and the
architecture add is counted. Fits are those of matrices of the real shapes, up to _OPERATIONS; larger ones are scaled by
their operations. Nothing is read but the configuration. Seconds are processor seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from peraxis_format import Axis, Component, DType, Encoding, from_float32
from peraxis_tools.checkpoints.parameter_names import ParameterSlice
from peraxis_tools.compress.calibration.generate import draw_tokens
from peraxis_tools.compress.calibration.partition import pieces_of
from peraxis_tools.compress.distill.losses import divergence
from peraxis_tools.compress.distill.parametrization import BuiltWeights, DeltaParametrization, TrainedComponent
from peraxis_tools.compress.fit.choice import fit_matrices
from peraxis_tools.compress.fit.fit import FitOptions, Matrix
from peraxis_tools.compress.fit.moments.sums import Moments, Statistics
from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
from peraxis_tools.compress.plan.estimate import fit_operations
from peraxis_tools.compress.plan.plan import PlannedModule
from peraxis_tools.compress.plan.price import PRICED_ROWS, measured_errors
from peraxis_tools.compress.plan.stage_work import SampleCounts, StageWork

__all__ = ["Probe", "probe_of", "warm_up"]

_SECONDS: Final = 0.3  # of each measurement
_OPERATIONS: Final = 1e11  # of a fit that is measured whole: about a second
_WIDTH: Final = 768
_TOKENS: Final = 1024
_TRAINED_ROWS: Final = 3072
_LOSS_TOKENS, _LOSS_LOGITS = 64, 1 << 15


@dataclass(slots=True, kw_only=True)
class Probe:
    """The measured costs of this machine.

    token, step, draw, priced, loss: processor seconds for a token in a layer, a generation step in a layer, a step's
    head and draw, a weight whose price is measured, and the loss of one logit. products: float32 operations per second.
    """

    token: float
    step: float
    draw: float
    products: float
    refine: bool
    priced: float = 0.0
    loss: float = 0.0
    _fits: dict[tuple[int, int, int], float] = field(default_factory=dict)
    _sums: dict[int, float] = field(default_factory=dict)
    _trained: dict[int, tuple[float, float]] = field(default_factory=dict)

    def seconds(self, work: StageWork) -> float:
        """Return the processor seconds of a stage."""
        fits = sum(self.fit(*shape) for shape in work.matrices)
        if work.fits:
            fits += work.fits / (fit_operations(_WIDTH, _WIDTH, 1) / self.fit(_WIDTH, _WIDTH, 1))
        steps = work.steps * (work.layers * self.step + self.draw)
        sums = sum(tokens * self.sum(width) for tokens, width in work.sums)
        priced = work.priced * self.priced
        builds = sum(weights * times * self.trained(masks)[0] for weights, masks, times in work.builds)
        reductions = sum(weights * times * self.trained(masks)[1] for weights, masks, times in work.reductions)
        forwards = work.products / self.products + work.passes * self.token + work.losses * self.loss
        return forwards + sums + fits + steps + priced + builds + reductions

    def sum(self, width: int) -> float:
        """Return the seconds to add one token's input to the moments."""
        if width not in self._sums:
            x, z = torch.randn(_TOKENS, width), torch.randn(_TOKENS, width)
            moments = Moments.zeros(width, paired=True, validates=True, grid=2.0**-30)
            self._sums[width] = _seconds(lambda: moments.add(x, z)) / _TOKENS
        return self._sums[width]

    def trained(self, masks: int) -> tuple[float, float]:
        """Return the seconds to build one weight for distillation, and to reduce its gradient."""
        if masks not in self._trained:
            self._trained[masks] = _trained_seconds(masks)
        return self._trained[masks]

    def fit(self, rows: int, width: int, masks: int) -> float:
        """Return the seconds to fit one matrix."""
        operations = fit_operations(rows, width, masks)
        if operations > _OPERATIONS and (rows, width, masks) != (_WIDTH, _WIDTH, 1):
            return operations / fit_operations(_WIDTH, _WIDTH, 1) * self.fit(_WIDTH, _WIDTH, 1)
        if (rows, width, masks) not in self._fits:
            self._fits[rows, width, masks] = _fit_seconds(rows, width, masks, refine=self.refine)
        return self._fits[rows, width, masks]


def probe_of(config: Any, text: SampleCounts, *, batch: int, sampled: torch.dtype, refine: bool) -> Probe:
    """Measure the costs of this machine. batch: samples in a batch; sampled: the dtype of generation."""
    tokens = max(1, min(batch, _TOKENS // text.length)) * text.length
    token = _layer_seconds(config, torch.float32, (tokens // text.length, text.length)) / tokens
    step = draw = 0.0
    if text.generated:
        rows = min(text.generated, text.together) * pieces_of(text.length)[0]
        step = _layer_seconds(config, sampled, (rows, 1))
        draw = _draw_seconds(config, sampled, rows)
    x = torch.randn(_TOKENS, _WIDTH)
    products = 2.0 * _TOKENS * _WIDTH**2 / _seconds(lambda: x.t() @ x)
    return Probe(
        token=token,
        step=step,
        draw=draw,
        products=products,
        refine=refine,
        priced=_priced_seconds(),
        loss=_loss_seconds() if text.distilled else 0.0,
    )


def warm_up() -> None:
    """Import and compile what a fit and a generation use: with matrices of 16, and a model of one layer of 8."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    _fit_seconds(16, 16, 1, refine=True)
    small = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    model: Any = LlamaForCausalLM(small).eval()
    drawn = GenerationConfig(do_sample=True, max_new_tokens=2, eos_token_id=None, pad_token_id=0)
    with torch.random.fork_rng():
        model.generate(torch.zeros(1, 1, dtype=torch.int64), generation_config=drawn)


def _layer_seconds(config: Any, dtype: torch.dtype, shape: tuple[int, int]) -> float:
    """Return the seconds of the first layer on ids of this shape, without the work that all layers share."""
    model = LayerwiseModel(config, dtype=dtype, device=torch.device("cpu"))
    for name in model.layer_parameters(0):
        value = model.get(name)
        model.set(name, torch.randn(value.shape, dtype=torch.float32).mul_(0.02) if value.is_meta else value)
    model.free_embedding()
    table: Any = model.model.get_input_embeddings()
    width = int(table.embedding_dim)
    if "forward" not in vars(table):  # an embedding that does more than read rows
        table.weight = torch.nn.Parameter(torch.zeros(table.weight.shape, dtype=dtype), requires_grad=False)
    ids, hidden = torch.zeros(shape, dtype=torch.int64), torch.randn(*shape, width).to(dtype)
    with torch.no_grad(), model.at_layer(0) as run:
        whole = _seconds(lambda: run(ids, hidden))
    with torch.no_grad():
        return max(whole - _seconds(lambda: model.embed(ids)), 0.2 * whole)


def _draw_seconds(config: Any, dtype: torch.dtype, count: int) -> float:
    """Return the seconds to compute a generation step's logits and to draw from them."""
    vocabulary, width = int(config.vocab_size), int(config.hidden_size)
    weight, x = torch.zeros(vocabulary, width, dtype=dtype), torch.randn(count, width).to(dtype)

    def draw() -> None:
        draw_tokens(torch.nn.functional.linear(x, weight).float())

    return _seconds(draw)


def _priced_seconds() -> float:
    """Return the seconds to measure the price of one weight, in a BF16 matrix of a typical size."""
    shape = (PRICED_ROWS, _WIDTH)
    module = PlannedModule(
        name="any",
        kind="linear",
        dtype=DType.BF16,
        shape=shape,
        base_dtype=DType.BF16,
        base_shape=shape,
        encoding=Encoding.SIGN,
        components=1,
    )
    draw = np.random.Generator(np.random.PCG64(0))
    base = draw.standard_normal((1, *shape), np.float32)
    tuned = base + 0.1 * draw.standard_normal((1, *shape), np.float32)
    left, right = (from_float32(values, DType.BF16) for values in (base, tuned))
    return _seconds(lambda: measured_errors(module, left, right)) / base.size


def _trained_seconds(masks: int) -> tuple[float, float]:
    """Return the seconds to build one weight with `masks` masks, and to reduce its gradient.

    They are measured on a BF16 matrix of a typical size.
    """
    draw = np.random.Generator(np.random.PCG64(0))
    component = Component(
        axis=Axis.ROW_COL,
        exponent=0,
        mask=draw.integers(0, 256, (_TRAINED_ROWS, _WIDTH // 8), dtype=np.uint8),
        row=np.full(_TRAINED_ROWS, 0.01, np.float16),
        col=np.ones(_WIDTH, np.float16),
    )
    shape, device = (_TRAINED_ROWS, _WIDTH), torch.device("cpu")
    components = torch.nn.ModuleList(
        TrainedComponent(component, shape, signs=False, device=device) for _ in range(masks)
    )
    pieces = [(ParameterSlice(tensor="any", parameter="any"), _TRAINED_ROWS, components)]
    weight = DeltaParametrization(pieces, torch.bfloat16, torch.float32, BuiltWeights())
    base, gradient = torch.randn(shape).bfloat16(), torch.randn(shape)
    with torch.no_grad():
        build, reduction = _seconds(lambda: weight.build(base)), _seconds(lambda: weight.gradients(gradient))
    return build / base.numel(), reduction / base.numel()


def _loss_seconds() -> float:
    """Return the seconds to compute the loss of one logit and its gradient."""
    shape = (_LOSS_TOKENS, _LOSS_LOGITS)
    target, logits = torch.randn(shape), torch.randn(shape, requires_grad=True)
    return _seconds(lambda: divergence(target, logits).backward()) / target.numel()


def _fit_seconds(rows: int, width: int, masks: int, *, refine: bool) -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, width, generator=generator)
    base = torch.randn(rows, width, generator=generator)
    tuned = base + 0.1 * torch.randn(rows, width, generator=generator)
    matrix = Matrix(base=base, fine_tuned=tuned, dtype=torch.bfloat16, components=masks)
    teacher = x + 0.01 * torch.randn(x.shape, generator=generator)
    halves = [Moments.zeros(width, paired=True, validates=True) for _ in range(2)]
    for moments in halves:
        moments.add(x, teacher)
        moments.tokens = max(moments.tokens, width)  # as a text that is long enough to validate both ways
    spent = []
    for _ in range(2):  # the first call compiles
        copies = [Moments(m.G.clone(), _copy(m.E), _copy(m.F), m.tokens) for m in halves]
        begin = time.process_time()
        statistics = Statistics(fit=copies[0], validation=copies[1], crossed=True)
        fit_matrices([matrix], statistics=statistics, options=FitOptions(refine=refine))
        spent.append(time.process_time() - begin)
    return min(spent)


def _copy(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.clone()


def _seconds(action: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    action()
    begin, calls = time.process_time(), 0
    while calls == 0 or time.process_time() - begin < _SECONDS:
        action()
        calls += 1
    return (time.process_time() - begin) / calls
