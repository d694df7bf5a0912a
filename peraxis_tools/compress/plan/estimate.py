"""Estimate the memory and the operations of each stage of a compression, from shapes alone.

A stage's memory does not include the imports. With c bytes a computed value, P values of all weights, O of those
outside the layers, N tokens of text in samples of n, and d the width of the hidden states:

    generate     g P with g bytes a value, keys and values of the samples of a batch, logits of a step
    sensitivity  c P, packed masks; activations, logits and the largest gradient of one sample
    table        c O, a float32 copy of the table, those of both checkpoints, its signs, a byte each, and 12 float32
                 copies of the rows that the text uses
    blocks       hidden states 2 c N d, inputs that passes keep, two layers, sums, copies of the largest matrix
    distill      the teacher, then its head, the base in the file's dtype, packed signs (and 4 bytes a trained sign),
                 activations and some logits of one sample, copies of the largest matrix
    write        4 copies of the largest tensor (run.py)

A probe (run/probe.py) turns the work into seconds: tokens that pass a layer, steps of generation, matrices that are
fitted, weights that distillation builds and whose gradients it reduces, logits whose loss it computes, float32
operations of products, and operations of fits (2 d_in^2 for each product with a row of a matrix).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from peraxis_format import Encoding
from peraxis_tools.checkpoints.kinds import group_of, layer_of
from peraxis_tools.compress.calibration.parts import pieces_of
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan.plan import TABLES, Plan, PlannedModule
from peraxis_tools.compress.plan.price import PRICED_ROWS

__all__ = [
    "GENERATED_SAMPLES",
    "SENSITIVITY_SAMPLES",
    "TABLE_TOKENS",
    "StageWork",
    "Text",
    "fit_operations",
    "sensitivity_pieces",
    "work_of",
]

TABLE_TOKENS: Final = 4  # for each input of a table that is tied to the head
GENERATED_SAMPLES: Final = 16  # at most, where none are asked for and memory allows
SENSITIVITY_SAMPLES: Final = 16
_PASSES: Final = 48  # backward passes of a sensitivity: fewer are noise, and the budget follows it
_LEAST_PIECE: Final = 64  # tokens; the model sees no text before a piece
_OUTPUTS: Final = frozenset({"o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc2", "w2", "dense_4h_to_h"})
_KEYS: Final = frozenset({"k_proj", "v_proj"})
_TRIAL_ROWS: Final = 128
_FLOAT: Final = 4
_REFINED_COPIES: Final = 12  # of the refined rows of a table
_SUMS: Final = 8  # float64 matrices as wide as an input, while it is fitted; two of float32 count as one
_ACTIVATIONS: Final = 4  # values that a backward pass keeps of a token, for each value of an input of a matrix
_TRAINED: Final = 16  # bytes of a trained value: itself, its gradient, and AdamW's two moments
_TRAINED_SIGN: Final = 4  # BYTES_A_SIGN of distill/latents.py, which imports torch
_LOGITS: Final = 32 << 20  # _LOGITS_BYTES of model/layerwise_model.py, which imports torch
_LOGITS_COPIES: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """The samples of a run. samples: of the text; generated: of the model; distilled: for distillation alone.

    length: tokens in each. value_bytes, sampled_bytes: of a computed value, in the fit and in the generation. together:
    samples that are generated at a time.
    """

    samples: int
    generated: int
    length: int
    value_bytes: int
    distilled: int = 0
    sampled_bytes: int = 4
    together: int = 32

    @property
    def calibrating(self) -> int:
        """The generated samples of the fit; distillation alone has the others (calibration/parts.py)."""
        return round(self.generated * self.samples / (self.samples + self.distilled))

    @property
    def tokens(self) -> int:
        """The tokens of all samples of the fit."""
        return (self.samples + self.calibrating) * self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """The memory and the work of one stage.

    memory: bytes beyond the imports.
    products: float32 operations of products.
    passes: tokens through a layer.
    sums: (tokens, width) of each input whose moments are summed.
    steps: steps of generation, through `layers` layers each.
    fits: operations of fits.
    matrices: (rows, width, masks) of each matrix that is fitted.
    priced: weights whose price is measured.
    builds: (weights, masks, times) of each matrix that distillation builds.
    reductions: the same of each whose gradient it reduces to those of its scales (distill/parametrization.py).
    losses: logits of a loss and of its gradient.
    """

    name: str
    memory: int
    products: float = 0.0
    passes: float = 0.0
    sums: tuple[tuple[int, int], ...] = ()
    steps: int = 0
    layers: int = 0
    fits: float = 0.0
    matrices: tuple[tuple[int, int, int], ...] = ()
    priced: int = 0
    builds: tuple[tuple[int, int, float], ...] = ()
    reductions: tuple[tuple[int, int, float], ...] = ()
    losses: float = 0.0


def work_of(plan: Plan, options: CompressOptions, text: Text | None) -> list[StageWork]:
    """The stages of a run in order. text: None where there is no fit on a text."""
    largest = max((_values(module) for module in plan.modules), default=0)
    write = StageWork(name="write", memory=4 * _FLOAT * largest)
    if text is None:
        return [write]
    stages = [_prices(plan)] if options.spends_freely else []
    if text.generated:
        stages.append(_generate(plan, text))
    if options.has_target:
        stages.append(_sensitivity(plan, text))
    tables = [module for module in plan.modules if module.kind in TABLES and module.encoding is Encoding.SIGN]
    if tables:
        stages.append(_table(plan, tables, text))
    stages.append(_blocks(plan, text))
    return [*stages, _distillation(plan, options, text), write] if options.distill_samples else [*stages, write]


def _values(module: PlannedModule) -> int:
    return math.prod(module.shape)


def _weights(plan: Plan) -> int:
    return sum(map(_values, plan.modules))


def _layers(plan: Plan) -> dict[int, list[PlannedModule]]:
    found: dict[int, list[PlannedModule]] = defaultdict(list)
    for module in plan.modules:
        layer = layer_of(module.name)
        if layer is not None:
            found[layer].append(module)
    return found


def _inside(plan: Plan) -> int:
    return sum(_values(module) for layer in _layers(plan).values() for module in layer)


def _outside(plan: Plan) -> int:
    return _weights(plan) - _inside(plan)


def _width(plan: Plan) -> int:
    return next((module.shape[-1] for module in plan.modules if module.kind == "embedding"), 1)


def _input_widths(modules: Sequence[PlannedModule]) -> list[int]:
    """d_in of each input that matrices of a layer read: one for q, k and v, one for gate and up."""
    inputs = {
        (module.name.rpartition(group_of(module.name))[0], group_of(module.name) in _OUTPUTS, module.shape[-1])
        for module in modules
        if module.encoding is Encoding.SIGN
    }
    return [width for _, _, width in inputs]


def _prices(plan: Plan) -> StageWork:
    """The prices of the default plan (price.py)."""
    signed = [m for m in plan.modules if m.encoding is Encoding.SIGN]
    numbers = sum(m.shape[-1] * min(PRICED_ROWS, _values(m) // m.shape[-1]) for m in signed)
    return StageWork(name="plan", memory=0, priced=numbers)


def _generate(plan: Plan, text: Text) -> StageWork:
    keys = sum(m.shape[0] for m in plan.modules if group_of(m.name) in _KEYS and len(m.shape) == 2)
    tokens = min(text.generated, text.together) * text.length
    pieces, steps = pieces_of(text.length)
    logits = 3 * _FLOAT * min(text.generated, text.together) * pieces * _vocabulary(plan)
    return StageWork(
        name="generate",
        memory=text.sampled_bytes * (_weights(plan) + 2 * tokens * keys) + logits,
        steps=steps * -(-text.generated // text.together),
        layers=len(_layers(plan)),
    )


def _vocabulary(plan: Plan) -> int:
    return max((m.shape[0] for m in plan.modules if m.kind in TABLES), default=0)


def sensitivity_pieces(samples: int, length: int) -> int:
    """The pieces that each sample of `length` tokens is cut into, so that a few samples give enough backward passes."""
    return max(1, min(-(-_PASSES // samples), length // _LEAST_PIECE))


def _sensitivity(plan: Plan, text: Text) -> StageWork:
    samples = min(SENSITIVITY_SAMPLES, text.samples + text.calibrating)
    pieces = sensitivity_pieces(samples, text.length)
    weights = _weights(plan)
    tokens = samples * text.length
    kept = _activations(plan, text.length // pieces) + max(map(_values, plan.modules))
    return StageWork(
        name="sensitivity",
        memory=text.value_bytes * (weights + kept) + _some_logits(plan, text) + weights // 2,
        passes=3.0 * tokens * len(_layers(plan)),
        # Masks are unpacked for each piece: 3 of them, some 10 operations a weight.
        products=6.0 * _outside(plan) * tokens + 30.0 * weights * samples * pieces,
    )


def _table(plan: Plan, tables: Sequence[PlannedModule], text: Text) -> StageWork:
    largest = max(map(_values, tables))
    masks = max(module.components for module in tables)
    used = 10.0 * float(text.tokens) ** 0.6  # of a text of natural language
    # A table of which the text uses more than half of the rows is refined as a whole (fit/rows.py).
    refined = max(_values(m) if 2 * used > m.shape[0] else used * m.shape[-1] for m in tables)
    copies = _FLOAT * (largest + int(_REFINED_COPIES * refined))
    copies += (2 * max(module.dtype.itemsize for module in tables) + masks) * largest  # a sign is a byte
    work = sum(
        fit_operations(int(min(m.shape[0], used)), m.shape[-1], m.components)
        + (4.0 * m.components + 4.0) * m.shape[0] * m.shape[-1] ** 2
        for m in tables
    )
    # The teacher's own pass on a part of the text gives a tied table its states.
    tokens = min(text.tokens, TABLE_TOKENS * _width(plan))
    passes = float(len(_layers(plan)) * tokens) if plan.tied or len(tables) == 1 else 0.0
    return StageWork(name="table", memory=text.value_bytes * _outside(plan) + copies, passes=passes, fits=work)


def _blocks(plan: Plan, text: Text) -> StageWork:
    layers = _layers(plan)
    widths = {index: _input_widths(modules) for index, modules in layers.items()}
    kept = 4 * text.value_bytes * text.tokens * max(map(sum, widths.values()), default=0)
    widest = max((max(its, default=0) for its in widths.values()), default=0)
    signed = [m for its in layers.values() for m in its if m.encoding is Encoding.SIGN]
    largest = max(map(_values, signed), default=0)
    states = 2 * text.value_bytes * text.tokens * _width(plan)
    memory = (
        2 * text.value_bytes * max((sum(map(_values, its)) for its in layers.values()), default=0)
        + states
        + kept
        + 8 * _SUMS * widest**2
        + 12 * _FLOAT * largest
    )
    matrices = tuple((_values(m) // m.shape[-1], m.shape[-1], m.components) for m in signed)
    passes = 2.0 * len(layers) * text.tokens
    return StageWork(
        name="blocks",
        memory=memory,
        passes=passes,
        sums=tuple((text.tokens, width) for its in widths.values() for width in its),
        matrices=matrices,
    )


def _activations(plan: Plan, tokens: int) -> int:
    """Values that a backward pass keeps of so many tokens."""
    return _ACTIVATIONS * tokens * sum(sum(_input_widths(modules)) for modules in _layers(plan).values())


def _some_logits(plan: Plan, text: Text) -> int:
    """The bytes of a loss on the logits of some tokens, with its gradient."""
    return _LOGITS_COPIES * min(_FLOAT * text.length * _vocabulary(plan), _LOGITS)


def _distillation(plan: Plan, options: CompressOptions, text: Text) -> StageWork:
    signed = [module for module in plan.modules if module.components]
    masked = sum(_values(module) * module.components for module in signed)
    base = sum(_values(module) * module.dtype.itemsize for module in signed)
    rest = _weights(plan) - sum(map(_values, signed))
    head = _vocabulary(plan) * _width(plan)
    states = text.value_bytes * text.length * _width(plan)
    trained = _TRAINED_SIGN * masked * (options.distill_sign_lr > 0) + _TRAINED * rest * (options.distill_full_lr > 0)
    student = (
        base
        + text.value_bytes * (rest + _activations(plan, text.length))
        + masked // 8
        + trained
        + text.value_bytes * head
        + _some_logits(plan, text)
        + 3 * _FLOAT * max(map(_values, signed), default=0)
    )
    every = text.samples + text.generated + text.distilled
    held_out = options.held_out * (text.distilled + text.generated - text.calibrating)
    validated = held_out * (options.distill_epochs + 1)
    learned = (every - held_out) * options.distill_epochs
    # The share of samples whose states the teacher computes anew each time; then it stays beside the student.
    anew = max(0.0, 1 - options.logits_limit / max(1, states * every))
    if anew > 0:
        student += text.value_bytes * (_weights(plan) - head)
    # A step's two passes, which keep and use a graph, take as long as four without one; the teacher's own is one.
    own = 4.0 * learned + validated
    passes = own + every + anew * (learned + validated)
    heads = own + learned + validated
    builds, reductions = _building(plan, signed, text, learned=learned, validated=validated)
    return StageWork(
        name="distill",
        memory=max(text.value_bytes * _weights(plan), student),
        passes=len(_layers(plan)) * passes * text.length,
        products=2.0 * head * heads * text.length,
        builds=builds,
        reductions=reductions,
        losses=float(_vocabulary(plan) * text.length * (learned + validated)),
    )


def _building(
    plan: Plan, signed: Sequence[PlannedModule], text: Text, *, learned: float, validated: float
) -> tuple[tuple[tuple[int, int, float], ...], ...]:
    """The builds and reductions of a distillation. learned, validated: samples.

    A weight is built for a forward pass and again for its backward pass: of a head for each part of the logits, of an
    embedding once, because its gradient needs no weight.
    """
    parts = -(-_FLOAT * text.length * _vocabulary(plan) // _LOGITS)
    alone = plan.tied or sum(module.kind in TABLES for module in plan.modules) == 1
    builds, reductions = [], []
    for module in signed:
        reads, heads = float(module.kind == "embedding"), 0.0
        if module.kind == "lm_head" or (reads and alone):
            heads = float(parts)
        elif not reads:
            heads = 1.0
        builds.append((_values(module), module.components, (reads + heads) * (learned + validated) + heads * learned))
        reductions.append((_values(module), module.components, (reads + heads) * learned))
    return tuple(builds), tuple(reductions)


def fit_operations(rows: int, width: int, components: int) -> float:
    """55 products with each row and component; 34 with each row of the trials, both ways."""
    trial = 2 * 34 * min(rows, _TRIAL_ROWS)
    return float(55 * rows * components + trial) * width**2
