"""End-to-end distillation: all scales are trained together against the teacher's logits.

    W_m = base_m + sum_k B_k o (row_k col_k^T)       rounded to the module's dtype as apply does (gradient passes)
    loss = mean over tokens of KL(teacher || student), or of the squared difference of the logits (the paper's)

Scales are trained as s = s_0 (1 + theta) in float32. A step is relative, so one learning rate suits deltas of any size,
rows and columns alike. With `signs`, the signs are trained too: each weight has a latent z that starts at the result of
the fit; B = sign(z), and the gradient of B passes to z (straight-through) while |z| is within a few scales. Latents and
their moments take four bytes a sign (latents.py).

The optimizer is AdamW without weight decay, with linear warm-up and a cosine to zero. Signs are frozen after 70% of the
steps: while they oscillate about zero (arXiv 2203.11086), the scales are fitted to one of many states; after that, to
the final one. After each epoch the state, with scales rounded to F16 as in the file, is validated on held-out samples.
The best state is returned; the state before the first step takes part, so the held-out loss never grows. Samples have
one length without padding, so no token has to be excluded. There is no dropout, and only the order of the samples is
random, so a run that is resumed after an epoch ends in the same bytes.

Memory: the teacher's last hidden states are computed first and kept in files, then all of the teacher but its head is
freed (it stays if they exceed the limit). The student is its base in the file's dtype, packed signs, and the
activations of one sample on a CPU (a batch on another device, which wants large products, with the activations of one
layer). Weights are built where they are used (parametrization.py), and logits, the teacher's too, are those of some
tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from peraxis_format import Encoding
from peraxis_format.ops.tensors import TORCH_DTYPES
from peraxis_tools.checkpoints.parameter_names import ParameterSlice
from peraxis_tools.compress.distill.losses import Losses, TeacherStates
from peraxis_tools.compress.distill.parametrization import (
    BuiltWeights,
    DeltaParametrization,
    TrainedComponent,
    TrainedTensor,
)
from peraxis_tools.compress.distill.training import Group, Training, TrainingState
from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
from peraxis_tools.compress.model.weights import Weights, kept_rows
from peraxis_tools.compress.plan.plan import EXACT, PlannedModule
from peraxis_tools.compress.run.types import FittedModule, ModuleReport
from peraxis_tools.compress.run.work_folder import WorkFolder
from peraxis_tools.process.heap import trim_heap

__all__ = ["DistillOptions", "DistillResult", "checkpoint_layers", "distill"]

_SIGNS_REST = 0.7  # share of all steps
_BEST = "distill-best"  # a part of the work folder


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions:
    """Options of distillation. epochs: passes over the samples; loss: kl or mse.

    lr: the learning rate of relative scales; sign_lr: that of latents, in units of the scale; full_lr: that of full
    tensors, in units of their root mean square. A rate of 0 leaves the signs or the full tensors unchanged.
    """

    epochs: int = 5
    lr: float = 1e-2
    sign_lr: float = 0.0
    full_lr: float = 0.0
    loss: str = "kl"
    batch_size: int = 2
    seed: int = 0
    logits_limit: int = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillResult:
    """The distilled modules, the steps of the training (0: nothing to train), and the held-out loss around it."""

    modules: Mapping[str, FittedModule]
    steps: int
    before: float
    after: float


def distill(
    *,
    weights: Weights,
    teacher: LayerwiseModel,
    student: LayerwiseModel,
    modules: Mapping[str, FittedModule],
    samples: Tensor,
    validation: Tensor,
    options: DistillOptions,
    work: WorkFolder,
    progress: Callable[[str, int, int], None],
) -> DistillResult:
    """Train all scales of `modules` together; continue from the state in `work`. samples, validation: ids [n, length].

    The teacher's layers are freed if its states of all samples are within the limit. After each epoch the training
    state is saved to `work`.
    """
    splits = {"fit": samples, "held-out": validation if len(validation) else samples}
    trim_heap()  # of the fit
    weights.fill_whole(teacher, weights.teacher)
    targets = TeacherStates(teacher, work, options.logits_limit)
    targets.keep(splits, partial(progress, "the fine-tuned model's states"))
    trained = _parametrize(student, weights, modules, options)
    trim_heap()  # of the teacher, and of the base in float32
    if student.device.type != "cpu":
        checkpoint_layers(student)
    losses = Losses(student=student, built=trained.built, targets=targets, splits=splits, kind=options.loss)
    if not any(group.parameters for group in trained.groups(options)):  # every module is exact, or as in the base
        loss = _validation_loss(trained, losses)
        return DistillResult(modules=modules, steps=0, before=loss, after=loss)
    batches = -(-len(samples) // options.batch_size)
    steps = options.epochs * batches
    training = Training(trained.groups(options), steps=steps)
    generator = torch.Generator().manual_seed(options.seed)
    # A run cannot be resumed without the best state.
    stands = training.resume(work) if work.load(_BEST) is not None else None
    if stands is None:
        loss = _validation_loss(trained, losses)
        stands = TrainingState(epochs=0, best=loss, before=loss)
        work.save(_BEST, list(trained.to_array(modules).values()))
    for epoch in range(options.epochs):
        order = torch.randperm(len(samples), generator=generator)
        if epoch < stands.epochs:
            continue
        for batch, rows in enumerate(order.split(options.batch_size)):
            step = epoch * batches + batch
            progress("distill", step, steps)
            training.step(step, partial(losses.backward, "fit", rows.tolist()))
        error = _validation_loss(trained, losses)
        if error < stands.best:
            work.save(_BEST, list(trained.to_array(modules).values()))
        stands = replace(stands, epochs=epoch + 1, best=min(error, stands.best))
        training.save(work, stands)
    progress("distill", steps, steps)
    best = {module.name: module for module in work.load(_BEST) or ()}
    return DistillResult(modules={**modules, **best}, steps=steps, before=stands.before, after=stands.best)


def checkpoint_layers(student: LayerwiseModel) -> None:
    """Recompute each layer's activations in the backward pass instead of storing them (activation checkpointing).

    The model's own switch is not used: it needs training mode, which also turns on dropout and jitter.
    """
    for layer in student.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    """Everything that is trained, by module: components, and full tensors with their original values."""

    components: Mapping[str, nn.ModuleList]
    full: Mapping[str, tuple[TrainedTensor, Tensor]]
    built: BuiltWeights

    def groups(self, options: DistillOptions) -> list[Group]:
        """The parameters by learning rate: scales, latents of signs, full tensors."""
        each = [component for components in self.components.values() for component in components]
        return [
            Group(parameters=[p for component in each for p in component.parameters()], lr=options.lr),
            Group(
                latents=[component.latents for component in each if component.latents is not None],  # type: ignore[misc]
                lr=options.sign_lr,
                share=_SIGNS_REST,
            ),
            Group(parameters=[tensor.theta for tensor, _ in self.full.values()], lr=options.full_lr),
        ]

    def to_array(self, modules: Mapping[str, FittedModule]) -> dict[str, FittedModule]:
        """The modules as the file would store them now."""
        signed = {
            name: replace(modules[name], components=tuple(c.to_component() for c in components))  # type: ignore[operator]
            for name, components in self.components.items()
        }
        whole = {
            name: FittedModule(name=name, report=ModuleReport(), full=tensor.to_array(value))
            for name, (tensor, value) in self.full.items()
        }
        return {**signed, **whole}

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Inside this context the scales are rounded to F16."""
        kept = []
        for component in (c for components in self.components.values() for c in components):
            kept.append((component, {name: p.detach().clone() for name, p in component.named_parameters()}))
            component.round()  # type: ignore[operator]
        yield
        with torch.no_grad():
            for component, values in kept:
                for name, value in values.items():
                    getattr(component, name).copy_(value)


def _parametrize(
    student: LayerwiseModel, weights: Weights, modules: Mapping[str, FittedModule], options: DistillOptions
) -> _Trained:
    """Fill the student with base weights and full tensors, and register the trained parametrizations on them."""
    weights.fill_whole(student, weights.base_only)
    full = _parametrize_full(student, weights) if options.full_lr > 0 else {}
    trained: dict[str, nn.ModuleList] = {}
    by_parameter: dict[str, list[tuple[ParameterSlice, int, nn.ModuleList]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    built = BuiltWeights()
    for name, module in modules.items():
        piece = weights.names.by_tensor.get(name)
        if piece is None or not module.components:
            continue
        planned: PlannedModule = weights.modules[name]
        covered = (kept_rows(planned), *planned.shape[1:])
        trained[name] = nn.ModuleList(
            TrainedComponent(c, covered, signs=options.sign_lr > 0, device=student.device) for c in module.components
        )
        by_parameter.setdefault(piece.parameter, []).append((piece, kept_rows(planned), trained[name]))
        dtypes[piece.parameter] = TORCH_DTYPES[planned.dtype]
    for parameter, pieces in by_parameter.items():
        dtype = dtypes[parameter]
        _compact(student, parameter, dtype)
        _put_over(student, parameter, DeltaParametrization(pieces, dtype, student.dtype, built))
    return _Trained(components=trained, full=full, built=built)


def _compact(student: LayerwiseModel, parameter: str, dtype: torch.dtype) -> None:
    """Store a parameter in the file's dtype, if that keeps its values."""
    value = student.get(parameter)
    smaller = value.to(dtype)
    if smaller.element_size() < value.element_size() and torch.equal(smaller.to(value.dtype), value):
        compact = nn.Parameter(smaller, requires_grad=False)
        for owner, leaf in student.owners(parameter):
            owner._parameters[leaf] = compact


def _parametrize_full(student: LayerwiseModel, weights: Weights) -> dict[str, tuple[TrainedTensor, Tensor]]:
    """Parametrize full float tensors that are a whole parameter, unless they equal the base's and so cost no byte."""
    found = {}
    for name, module in weights.modules.items():
        piece = weights.names.by_tensor.get(name)
        whole = piece is not None and piece.index is None and piece.rows is None
        trained = module.encoding is Encoding.FULL and module.dtype.is_float and module.reason != EXACT
        if not trained or piece is None or not whole:
            continue
        value = student.get(piece.parameter)
        if module.base_shape == module.shape and torch.equal(weights.read(weights.base, name).to(value), value):
            continue
        tensor = TrainedTensor(value, module.dtype)
        _put_over(student, piece.parameter, tensor)
        found[name] = (tensor, value)
    return found


def _put_over(student: LayerwiseModel, parameter: str, module: nn.Module) -> None:
    for owner, leaf in student.owners(parameter):
        parametrize.register_parametrization(owner, leaf, module, unsafe=True)


def _validation_loss(trained: _Trained, losses: Losses) -> float:
    """The held-out loss of the state as the file would store it."""
    with trained.rounded():
        return losses.mean("held-out")
