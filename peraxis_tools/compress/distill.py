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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peraxis_format import Axis, Component, encode_scale_pair, encode_scales, pack_signs, unpack_signs
from peraxis_tools.compress.modules import TORCH_DTYPES
from peraxis_tools.compress.names import Piece
from peraxis_tools.compress.plan import PlannedModule
from peraxis_tools.compress.skeleton import Skeleton
from peraxis_tools.compress.types import FittedModule
from peraxis_tools.compress.weights import Weights, kept_rows

__all__ = ["DistillOptions", "DistillResult", "distill", "fill_whole"]

_WARM_UP = 0.05
_CLIP = 3.0  # a latent further than this many scales from zero gets no gradient: its sign is decided


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions:
    """epochs over the samples, lr of relative scales, sign_lr of latents in units of the scale; loss kl or mse."""

    epochs: int = 5
    lr: float = 1e-2
    sign_lr: float = 0.0
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


class _TrainedComponent(nn.Module):
    """One component with relative scales, and latents where signs are trained."""

    def __init__(self, component: Component, d_in: int, *, signs: bool, device: torch.device) -> None:
        super().__init__()
        self.axis = component.axis
        factor = 2.0**component.exponent
        unpacked = torch.from_numpy(unpack_signs(component.mask, d_in)).to(device)
        for name, array in component.scales().items():
            scale = torch.from_numpy(array.astype(np.float32)).to(device)
            # The exponent belongs to one of the two scales of row+col: which does not matter, they are relative.
            if name != "col" or component.axis is Axis.COL:
                scale = scale * factor
            self.register_buffer(f"{name}_start", scale)
            self.register_parameter(name, nn.Parameter(torch.zeros_like(scale)))
        self.register_buffer("signs", unpacked)
        # Half a scale from zero: near enough that a sign can turn, far enough that noise does not turn it.
        self.latent = nn.Parameter(torch.where(unpacked, 0.5, -0.5)) if signs else None

    def scale(self, name: str) -> Tensor:
        return torch.relu(getattr(self, f"{name}_start") * (1 + getattr(self, name)))

    def current_signs(self) -> Tensor:
        return self.signs if self.latent is None else self.latent >= 0

    def forward(self) -> Tensor:
        if self.axis is Axis.TENSOR:
            size = self.scale("scalar")
        else:
            size = torch.ones((), device=self.signs.device)
            if self.axis is not Axis.COL:
                size = size * self.scale("row").unsqueeze(-1)
            if self.axis is not Axis.ROW:
                size = size * self.scale("col").unsqueeze(-2)
        if self.latent is None:
            return torch.where(self.signs, size, -size)
        hard = torch.where(self.latent >= 0, 1.0, -1.0)
        soft = self.latent.clamp(-_CLIP, _CLIP)
        return (soft + (hard - soft).detach()) * size

    def stored(self) -> Component:
        """As the file holds it."""
        with torch.no_grad():
            mask = pack_signs(self.current_signs().cpu().numpy())
            arrays = {
                name: self.scale(name).double().cpu().numpy()
                for name in ("row", "col", "scalar")
                if hasattr(self, f"{name}_start")
            }
        if self.axis is Axis.ROW_COL:
            row, col, exponent = encode_scale_pair(arrays["row"], arrays["col"])
            return Component(axis=self.axis, exponent=exponent, mask=mask, row=row, col=col)
        ((name, array),) = arrays.items()
        half, exponent = encode_scales(array)
        return Component(axis=self.axis, exponent=exponent, mask=mask, **{name: half})


class _Dressed(nn.Module):
    """Parametrization: base parameter -> base + components, rounded to the module's dtype (gradient passes through)."""

    def __init__(self, pieces: Sequence[tuple[Piece, int, nn.ModuleList]], dtype: torch.dtype) -> None:
        super().__init__()
        self._pieces = [(piece, kept) for piece, kept, _ in pieces]
        self.components = nn.ModuleList(components for _, _, components in pieces)
        self._dtype = dtype

    def forward(self, base: Tensor) -> Tensor:
        if len(self._pieces) == 1 and self._pieces[0][0].index is None and self._pieces[0][0].rows is None:
            total = self._add(base, self._pieces[0][1], self.components[0])
        else:
            total = base.clone()
            for (piece, kept), components in zip(self._pieces, self.components, strict=True):
                part = piece.select(total)
                part.copy_(self._add(part.clone(), kept, components))
        rounded = total.detach().to(self._dtype).to(total.dtype)
        return (total + (rounded - total).detach()).to(base.dtype)

    def _add(self, value: Tensor, kept: int, components: nn.Module) -> Tensor:
        for component in components:  # type: ignore[attr-defined]
            dense = component()
            if kept < value.shape[0]:
                dense = torch.cat([dense, dense.new_zeros(value.shape[0] - kept, *value.shape[1:])])
            value = value + dense
        return value


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
    trained = _dress(student, weights, modules, signs=options.sign_lr > 0)
    enable = getattr(student.model, "gradient_checkpointing_enable", None)
    if enable is not None and student.device.type != "cpu":
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    judge = held_out if len(held_out) else samples
    cache = _TeacherLogits(teacher, options.logits_limit)
    optimizer, schedule = _optimizer(trained, options, steps=options.epochs * -(-len(samples) // options.batch_size))
    best = before = _judge(student, trained, cache, judge, options)
    best_state = _stored(trained)
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
            best, best_state = error, _stored(trained)
    progress("distill", options.epochs, options.epochs)
    distilled = {name: replace(modules[name], components=components) for name, components in best_state.items()}
    return DistillResult(modules={**modules, **distilled}, before=before, after=best)


def fill_whole(skeleton: Skeleton, weights: Weights, source: Callable[[str], Tensor]) -> None:
    """Fill every layer: the whole model in memory."""
    weights.fill_outer(skeleton, source)
    for index in range(len(skeleton)):
        weights.fill(skeleton, source, skeleton.layer_parameters(index))


def _dress(
    student: Skeleton, weights: Weights, modules: Mapping[str, FittedModule], *, signs: bool
) -> dict[str, nn.ModuleList]:
    """Fill the student with base weights and put the components over them. Returns the components by module."""
    fill_whole(student, weights, weights.undressed)
    trained: dict[str, nn.ModuleList] = {}
    by_parameter: dict[str, list[tuple[Piece, int, nn.ModuleList]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, module in modules.items():
        piece = weights.names.by_tensor.get(name)
        if piece is None or not module.components:
            continue
        planned: PlannedModule = weights.modules[name]
        trained[name] = nn.ModuleList(
            _TrainedComponent(c, planned.shape[-1], signs=signs, device=student.device) for c in module.components
        )
        by_parameter.setdefault(piece.parameter, []).append((piece, kept_rows(planned), trained[name]))
        dtypes[piece.parameter] = TORCH_DTYPES[planned.dtype]
    for parameter, pieces in by_parameter.items():
        dressed = _Dressed(pieces, dtypes[parameter])
        for owner, leaf in student.owners(parameter):
            parametrize.register_parametrization(owner, leaf, dressed, unsafe=True)
    return trained


def _optimizer(
    trained: Mapping[str, nn.ModuleList], options: DistillOptions, *, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    named = [(name, p) for components in trained.values() for name, p in components.named_parameters()]
    groups = [{"params": [p for name, p in named if not name.endswith("latent")], "lr": options.lr}]
    latents = [p for name, p in named if name.endswith("latent")]
    if latents:
        groups.append({"params": latents, "lr": options.sign_lr})
    for _, parameter in named:
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


def _stored(trained: Mapping[str, nn.ModuleList]) -> dict[str, tuple[Component, ...]]:
    return {name: tuple(c.stored() for c in components) for name, components in trained.items()}  # type: ignore[operator]


@torch.no_grad()
def _judge(
    student: Skeleton,
    trained: Mapping[str, nn.ModuleList],
    teacher: _TeacherLogits,
    held_out: Tensor,
    options: DistillOptions,
) -> float:
    """Held-out loss of the state as it would be stored: relative scales are set to what F16 leaves of them."""
    kept = {}
    for components in trained.values():
        for component in components:
            kept[component] = {name: p.detach().clone() for name, p in component.named_parameters()}
            _round(component)
    total, count = 0.0, 0
    with parametrize.cached():
        for start in range(0, len(held_out), options.batch_size):
            ids = held_out[start : start + options.batch_size]
            rows = list(range(start, start + len(ids)))
            total += float(_loss(student, teacher, ids, ("held-out", rows), options.loss)) * len(ids)
            count += len(ids)
    for component, values in kept.items():
        for name, value in values.items():
            getattr(component, name).copy_(value)
    return total / count


def _round(component: nn.Module) -> None:
    """Set the relative scales of a component so that its scales are those of the file."""
    stored: Component = component.stored()  # type: ignore[operator]
    factor = 2.0**stored.exponent
    for name, array in stored.scales().items():
        exact = torch.from_numpy(array.astype(np.float64)).to(component.signs.device)  # type: ignore[union-attr,arg-type]
        if name != "col" or stored.axis is Axis.COL:
            exact = exact * factor
        start = getattr(component, f"{name}_start").double()
        relative = torch.where(start > 0, exact / start - 1, torch.zeros_like(exact))
        getattr(component, name).copy_(relative.float())
