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
    write        4 copies of the largest tensor (run/delta_file.py)

A probe (run/probe.py) turns the work into seconds: tokens that pass a layer, steps of generation, matrices that are
fitted, weights that distillation builds and whose gradients it reduces, logits whose loss it computes, float32
operations of products, and operations of fits (2 d_in^2 for each product with a row of a matrix).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from peraxis_format import Encoding
from peraxis_tools.checkpoints.kinds import group_of, layer_of
from peraxis_tools.compress.calibration.partition import pieces_of
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan.plan import TABLES, Plan, PlannedModule
from peraxis_tools.compress.plan.price import MEASURED_MASKS, PRICED_ROWS
from peraxis_tools.compress.plan.stage_work import SampleCounts, StageWork
from peraxis_tools.compress.shared_sizes import BYTES_A_SIGN, LOGITS_BYTES, TRIAL_ROWS

__all__ = [
    "GENERATED_SAMPLES",
    "SENSITIVITY_SAMPLES",
    "TABLE_TOKENS",
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
_FLOAT: Final = 4
_REFINED_COPIES: Final = 12  # of the refined rows of a table
_SUMS: Final = 8  # float64 matrices as wide as an input, while it is fitted; two of float32 count as one
_ACTIVATIONS: Final = 4  # values that a backward pass keeps of a token, for each value of an input of a matrix
_TRAINED: Final = 16  # bytes of a trained value: itself, its gradient, and AdamW's two moments
_LOGITS_COPIES: Final = 6
_STEP_LOGITS_COPIES: Final = 3  # float32 copies of the logits of a step of generation
_WRITE_COPIES: Final = 4  # float32 copies of the largest tensor (run/delta_file.py)
_BLOCK_COPIES: Final = 12  # float32 copies of the largest matrix of a block, while it is fitted
_DISTILL_COPIES: Final = 3  # float32 copies of the largest matrix that distillation builds
_KEPT_INPUTS: Final = 4  # for each input of a matrix: the teacher's, the student's, and as many that wait (passes.py)
_PRODUCT: Final = 2.0  # operations of a product, for each weight and token: multiply and add
_WITH_GRADIENTS: Final = 3.0  # forward and backward pass have three times the products of the forward pass
_UNPACKED: Final = 10.0 * MEASURED_MASKS  # some 10 operations to unpack a weight of a mask (sensitivity.py)
# Heaps' law: n tokens of natural language have some 10 n^0.6 different ones.
_HEAPS_FACTOR, _HEAPS_EXPONENT = 10.0, 0.6
# Operations of a fit, in units of d_in^2 for each row. The probe times real fits, so only the ratios of these matter.
_FIT: Final = 55  # for each component
_TRIAL: Final = 34  # in each of the two directions (choice.py)
_UNUSED_ROW: Final = 4.0  # for each component, and as many for the correction, of a row without tokens (fit/rows.py)


def work_of(plan: Plan, options: CompressOptions, text: SampleCounts | None) -> list[StageWork]:
    """The stages of a run in order. text: None where there is no fit on a text."""
    largest = max((_values(module) for module in plan.modules), default=0)
    write = StageWork(name="write", memory=_WRITE_COPIES * _FLOAT * largest)
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


def _generate(plan: Plan, text: SampleCounts) -> StageWork:
    keys = sum(m.shape[0] for m in plan.modules if group_of(m.name) in _KEYS and len(m.shape) == 2)
    tokens = min(text.generated, text.together) * text.length
    pieces, steps = pieces_of(text.length)
    logits = _STEP_LOGITS_COPIES * _FLOAT * min(text.generated, text.together) * pieces * _vocabulary(plan)
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


def _sensitivity(plan: Plan, text: SampleCounts) -> StageWork:
    samples = min(SENSITIVITY_SAMPLES, text.samples + text.calibrating)
    pieces = sensitivity_pieces(samples, text.length)
    weights = _weights(plan)
    tokens = samples * text.length
    kept = _activations(plan, text.length // pieces) + max(map(_values, plan.modules))
    return StageWork(
        name="sensitivity",
        memory=text.value_bytes * (weights + kept) + _some_logits(plan, text) + weights // 2,
        passes=_WITH_GRADIENTS * tokens * len(_layers(plan)),
        # Masks are unpacked for each piece.
        products=_WITH_GRADIENTS * _PRODUCT * _outside(plan) * tokens + _UNPACKED * weights * samples * pieces,
    )


def _table(plan: Plan, tables: Sequence[PlannedModule], text: SampleCounts) -> StageWork:
    largest = max(map(_values, tables))
    masks = max(module.components for module in tables)
    used = _HEAPS_FACTOR * float(text.tokens) ** _HEAPS_EXPONENT
    # A table of which the text uses more than half of the rows is refined as a whole (fit/rows.py).
    refined = max(_values(m) if 2 * used > m.shape[0] else used * m.shape[-1] for m in tables)
    copies = _FLOAT * (largest + int(_REFINED_COPIES * refined))
    copies += (2 * max(module.dtype.itemsize for module in tables) + masks) * largest  # a sign is a byte
    work = sum(
        fit_operations(int(min(m.shape[0], used)), m.shape[-1], m.components)
        + _UNUSED_ROW * (m.components + 1) * m.shape[0] * m.shape[-1] ** 2
        for m in tables
    )
    # The teacher's own pass on a part of the text gives a tied table its states.
    tokens = min(text.tokens, TABLE_TOKENS * _width(plan))
    passes = float(len(_layers(plan)) * tokens) if plan.tied or len(tables) == 1 else 0.0
    return StageWork(name="table", memory=text.value_bytes * _outside(plan) + copies, passes=passes, fits=work)


def _blocks(plan: Plan, text: SampleCounts) -> StageWork:
    layers = _layers(plan)
    widths = {index: _input_widths(modules) for index, modules in layers.items()}
    kept = _KEPT_INPUTS * text.value_bytes * text.tokens * max(map(sum, widths.values()), default=0)
    widest = max((max(its, default=0) for its in widths.values()), default=0)
    signed = [m for its in layers.values() for m in its if m.encoding is Encoding.SIGN]
    largest = max(map(_values, signed), default=0)
    states = 2 * text.value_bytes * text.tokens * _width(plan)
    memory = (
        2 * text.value_bytes * max((sum(map(_values, its)) for its in layers.values()), default=0)
        + states
        + kept
        + 8 * _SUMS * widest**2
        + _BLOCK_COPIES * _FLOAT * largest
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


def _some_logits(plan: Plan, text: SampleCounts) -> int:
    """The bytes of a loss on the logits of some tokens, with its gradient."""
    return _LOGITS_COPIES * min(_FLOAT * text.length * _vocabulary(plan), LOGITS_BYTES)


def _distillation(plan: Plan, options: CompressOptions, text: SampleCounts) -> StageWork:
    signed = [module for module in plan.modules if module.components]
    masked = sum(_values(module) * module.components for module in signed)
    base = sum(_values(module) * module.dtype.itemsize for module in signed)
    rest = _weights(plan) - sum(map(_values, signed))
    head = _vocabulary(plan) * _width(plan)
    states = text.value_bytes * text.length * _width(plan)
    trained = BYTES_A_SIGN * masked * (options.distill_sign_lr > 0) + _TRAINED * rest * (options.distill_full_lr > 0)
    student = (
        base
        + text.value_bytes * (rest + _activations(plan, text.length))
        + masked // 8
        + trained
        + text.value_bytes * head
        + _some_logits(plan, text)
        + _DISTILL_COPIES * _FLOAT * max(map(_values, signed), default=0)
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
        products=_PRODUCT * head * heads * text.length,
        builds=builds,
        reductions=reductions,
        losses=float(_vocabulary(plan) * text.length * (learned + validated)),
    )


def _building(
    plan: Plan, signed: Sequence[PlannedModule], text: SampleCounts, *, learned: float, validated: float
) -> tuple[tuple[tuple[int, int, float], ...], ...]:
    """The builds and reductions of a distillation. learned, validated: samples.

    A weight is built for a forward pass and again for its backward pass: of a head for each part of the logits, of an
    embedding once, because its gradient needs no weight.
    """
    parts = -(-_FLOAT * text.length * _vocabulary(plan) // LOGITS_BYTES)
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
    """Return the operations of the fit of a matrix: those of each row and component, and those of the trials."""
    trials = 2 * _TRIAL * min(rows, TRIAL_ROWS)
    return float(_FIT * rows * components + trials) * width**2
