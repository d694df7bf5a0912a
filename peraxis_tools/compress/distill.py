"""End-to-end distillation: all scales together, against the teacher's logits.

    W_m = base_m + sum_k B_k o (row_k col_k^T)       rounded to the module's dtype as apply does (gradient passes)
    loss = mean over tokens of KL(teacher || student), or of the squared difference of the logits (the paper's)

Scales are trained as s = s_0 (1 + theta) in float32: a step is relative, so one learning rate suits deltas of any size,
rows and columns alike. With `signs`, the signs are trained too: each weight gets a latent z, started at where the
fit left it; B = sign(z), and the gradient of B passes to z (straight-through) while |z| is within a few scales.

AdamW without decay, linear warm-up, cosine to zero. After each epoch the state, as it would be stored (F16 scales),
is judged on held-out samples; the best is kept, the state before the first step among them: never worse there.
Samples are of one length without padding: no token is excluded, because none has to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peraxis_format import Encoding
from peraxis_tools.compress.modules import TORCH_DTYPES
from peraxis_tools.compress.names import Piece
from peraxis_tools.compress.plan import PlannedModule
from peraxis_tools.compress.skeleton import Skeleton
from peraxis_tools.compress.trained import Dressed, TrainedComponent, TrainedTensor
from peraxis_tools.compress.types import FittedModule, ModuleReport
from peraxis_tools.compress.weights import Weights, kept_rows

__all__ = ["DistillOptions", "DistillResult", "distill", "fill_whole"]

_WARM_UP = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions:
    """epochs over the samples; loss kl or mse.

    lr: of relative scales; sign_lr: of latents in units of the scale; full_lr: of full tensors in units of their
    root mean square. At 0 the signs, the full tensors, stay as they are.
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
    """The modules as distilled, and the held-out loss before and after."""

    modules: Mapping[str, FittedModule]
    before: float
    after: float


def distill(
    *,
    weights: Weights,
    teacher: Skeleton,
    student: Skeleton,
    modules: Mapping[str, FittedModule],
    samples: Tensor,
    held_out: Tensor,
    options: DistillOptions,
    progress: Callable[[str, int, int], None],
) -> DistillResult:
    """Train all scales of `modules` together. samples, held_out: ids [n, length]. Both models are loaded whole."""
    fill_whole(teacher, weights, weights.teacher)
    trained = _dress(student, weights, modules, options)
    enable = getattr(student.model, "gradient_checkpointing_enable", None)
    if enable is not None and student.device.type != "cpu":
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    judge = held_out if len(held_out) else samples
    cache = _TeacherLogits(teacher, options.logits_limit)
    optimizer, schedule = _optimizer(trained, options, steps=options.epochs * -(-len(samples) // options.batch_size))
    best = before = _judge(student, trained, cache, judge, options)
    best_state = trained.stored(modules)
    generator = torch.Generator().manual_seed(options.seed)
    for epoch in range(options.epochs):
        progress("distill", epoch, options.epochs)
        order = torch.randperm(len(samples), generator=generator)
        student.model.train()
        for start in range(0, len(samples), options.batch_size):
            rows = order[start : start + options.batch_size].to(samples.device)
            loss = _loss(student, cache, samples[rows], ("fit", rows.tolist()), options.loss)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        student.model.eval()
        error = _judge(student, trained, cache, judge, options)
        if error < best:
            best, best_state = error, trained.stored(modules)
    progress("distill", options.epochs, options.epochs)
    return DistillResult(modules={**modules, **best_state}, before=before, after=best)


def fill_whole(skeleton: Skeleton, weights: Weights, source: Callable[[str], Tensor]) -> None:
    """Fill every layer: the whole model in memory."""
    weights.fill_outer(skeleton, source)
    for index in range(len(skeleton)):
        weights.fill(skeleton, source, skeleton.layer_parameters(index))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    """What is trained, by module: components, and full tensors with the value that they stand over."""

    components: Mapping[str, nn.ModuleList]
    full: Mapping[str, tuple[TrainedTensor, Tensor]]

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
        """(scales, latents of signs, full tensors)."""
        named = [pair for components in self.components.values() for pair in components.named_parameters()]
        latents = [p for name, p in named if name.endswith("latent")]
        scales = [p for name, p in named if not name.endswith("latent")]
        return scales, latents, [tensor.theta for tensor, _ in self.full.values()]

    def stored(self, modules: Mapping[str, FittedModule]) -> dict[str, FittedModule]:
        """The modules as the file would hold them now."""
        signed = {
            name: replace(modules[name], components=tuple(c.stored() for c in components))  # type: ignore[operator]
            for name, components in self.components.items()
        }
        whole = {
            name: FittedModule(name=name, report=ModuleReport(), full=tensor.stored(value))
            for name, (tensor, value) in self.full.items()
        }
        return {**signed, **whole}

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Inside, scales are what F16 leaves of them."""
        kept = []
        for component in (c for components in self.components.values() for c in components):
            kept.append((component, {name: p.detach().clone() for name, p in component.named_parameters()}))
            component.round()  # type: ignore[operator]
        yield
        with torch.no_grad():
            for component, values in kept:
                for name, value in values.items():
                    getattr(component, name).copy_(value)


def _dress(
    student: Skeleton, weights: Weights, modules: Mapping[str, FittedModule], options: DistillOptions
) -> _Trained:
    """Fill the student with base weights and full tensors, and put over them what is trained."""
    fill_whole(student, weights, weights.undressed)
    full = _dress_full(student, weights) if options.full_lr > 0 else {}
    trained: dict[str, nn.ModuleList] = {}
    by_parameter: dict[str, list[tuple[Piece, int, nn.ModuleList]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, module in modules.items():
        piece = weights.names.by_tensor.get(name)
        if piece is None or not module.components:
            continue
        planned: PlannedModule = weights.modules[name]
        trained[name] = nn.ModuleList(
            TrainedComponent(c, planned.shape[-1], signs=options.sign_lr > 0, device=student.device)
            for c in module.components
        )
        by_parameter.setdefault(piece.parameter, []).append((piece, kept_rows(planned), trained[name]))
        dtypes[piece.parameter] = TORCH_DTYPES[planned.dtype]
    for parameter, pieces in by_parameter.items():
        _put_over(student, parameter, Dressed(pieces, dtypes[parameter]))
    return _Trained(components=trained, full=full)


def _dress_full(student: Skeleton, weights: Weights) -> dict[str, tuple[TrainedTensor, Tensor]]:
    """Full float tensors that are a whole parameter each; not what the base has too, as that costs no byte."""
    found = {}
    for name, module in weights.modules.items():
        piece = weights.names.by_tensor.get(name)
        whole = piece is not None and piece.index is None and piece.rows is None
        if module.encoding is not Encoding.FULL or not module.dtype.is_float or piece is None or not whole:
            continue
        value = student.get(piece.parameter)
        if module.base_shape == module.shape and torch.equal(weights.read(weights.base, name).to(value), value):
            continue
        tensor = TrainedTensor(value, module.dtype)
        _put_over(student, piece.parameter, tensor)
        found[name] = (tensor, value)
    return found


def _put_over(student: Skeleton, parameter: str, module: nn.Module) -> None:
    for owner, leaf in student.owners(parameter):
        parametrize.register_parametrization(owner, leaf, module, unsafe=True)


def _optimizer(
    trained: _Trained, options: DistillOptions, *, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    rates = (options.lr, options.sign_lr, options.full_lr)
    groups = [{"params": p, "lr": lr} for p, lr in zip(trained.parameters(), rates, strict=True) if p]
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warm = max(1, round(_WARM_UP * steps))

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


class _TeacherLogits:
    """The teacher's logits by sample, kept up to a limit of bytes, beyond it computed again."""

    def __init__(self, teacher: Skeleton, limit: int) -> None:
        self._teacher, self._limit = teacher, limit
        self._held: dict[tuple[str, int], Tensor] = {}
        self._size = 0

    @torch.no_grad()
    def __call__(self, ids: Tensor, key: tuple[str, list[int]]) -> Tensor:
        split, rows = key
        if all((split, row) in self._held for row in rows):
            return torch.stack([self._held[split, row] for row in rows])
        logits = self._teacher.model(input_ids=ids, use_cache=False).logits
        for row, value in zip(rows, logits, strict=True):
            size = value.numel() * value.element_size()
            if (split, row) not in self._held and self._size + size <= self._limit:
                self._held[split, row] = value.clone()
                self._size += size
        return logits


def _loss(student: Skeleton, teacher: _TeacherLogits, ids: Tensor, key: tuple[str, list[int]], kind: str) -> Tensor:
    target = teacher(ids, key).float()
    logits = student.model(input_ids=ids, use_cache=False).logits.float()
    if kind == "mse":
        return torch.mean((logits - target).square())
    log_p, log_q = torch.log_softmax(target, -1), torch.log_softmax(logits, -1)
    return torch.sum(log_p.exp() * (log_p - log_q), dim=-1).mean()


@torch.no_grad()
def _judge(
    student: Skeleton, trained: _Trained, teacher: _TeacherLogits, held_out: Tensor, options: DistillOptions
) -> float:
    """Held-out loss of the state as it would be stored."""
    total, count = 0.0, 0
    with trained.rounded(), parametrize.cached():
        for start in range(0, len(held_out), options.batch_size):
            ids = held_out[start : start + options.batch_size]
            rows = list(range(start, start + len(ids)))
            total += float(_loss(student, teacher, ids, ("held-out", rows), options.loss)) * len(ids)
            count += len(ids)
    return total / count
