"""The parametrizations that distillation trains, registered on the student's own parameters.

    signed tensor   W = base + sum_k B_k o (row_k col_k^T)      row = row_0 (1 + theta), so is col; B: a packed mask,
                                                                which a step rewrites if signs are trained
    full tensor     W = W_0 + rms(W_0) theta                    embeddings, lm_head, norms, biases

W is rounded to its dtype as apply rounds it; gradients pass through roundings and signs (straight-through):

    dL/drow_i = sum_j G_ij B_ij col_j      dL/dcol_j = sum_i G_ij B_ij row_i      G = dL/dW
    dL/dB_ij  = G_ij row_i col_j, added to the latents of signs as it is found (latents.py)

Memory: for a signed tensor the graph keeps scales alone. Signs stay packed, the base stays in the module's dtype, and
W itself, which a product wants again in the backward pass, is built again there (`BuiltWeights`): that is one pass over
memory beside products that read it for each token. Written as plain torch operations, the graph would keep two dense
float32 tensors for each mask, and W.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from peraxis_format import Array, Axis, Component, DType, encode_scale_pair, encode_scales
from peraxis_format.ops.rebuild import rebuild_tensor
from peraxis_format.ops.rebuild.torch import ComponentTensors
from peraxis_format.ops.tensors import TORCH_DTYPES, storage_array
from peraxis_tools.checkpoints.parameter_names import ParameterSlice
from peraxis_tools.compress.distill.latents import SignLatents, row_blocks

__all__ = ["BuiltWeights", "DeltaParametrization", "TrainedComponent", "TrainedTensor"]


class TrainedComponent(nn.Module):
    """One component with relative scales, and the latents of its signs if these are trained.

    covered: the shape [..., d_out, d_in] of its tensor, a batch of matrices.
    """

    def __init__(self, component: Component, covered: tuple[int, ...], *, signs: bool, device: torch.device) -> None:
        super().__init__()
        self.axis = component.axis
        self._shape = (math.prod(covered[:-2]), *covered[-2:])
        self._mask_shape = component.mask.shape
        factor = 2.0**component.exponent
        for name, array in component.scales().items():
            scale = torch.from_numpy(array.astype(np.float32)).to(device)
            # For row+col the exponent may go into either vector, because both are trained relatively.
            if name != "col" or component.axis is Axis.COL:
                scale = scale * factor
            self.register_buffer(f"{name}_start", scale)
            self.register_parameter(name, nn.Parameter(torch.zeros_like(scale)))
        self.mask = torch.from_numpy(component.mask.copy()).to(device).reshape(*self._shape[:-1], -1)
        self.latents = SignLatents(self.mask, covered[-1]) if signs else None

    def scale(self, name: str) -> Tensor:
        return torch.relu(getattr(self, f"{name}_start") * (1 + getattr(self, name)))

    def factors(self) -> tuple[Tensor, Tensor]:
        """row [batch, d_out] and col [batch, d_in], float32, so that |term| = row_i * col_j for every axis."""
        batch, d_out, d_in = self._shape
        start = next(self.buffers())
        row, col = start.new_ones(batch, d_out), start.new_ones(batch, d_in)
        if self.axis is Axis.TENSOR:
            return self.scale("scalar").expand(batch, d_out), col
        if self.axis is not Axis.COL:
            row = self.scale("row").reshape(batch, d_out)
        if self.axis is not Axis.ROW:
            col = self.scale("col").reshape(batch, d_in)
        return row, col

    def signs(self, e: int, rows: slice) -> Tensor:
        """float32 [rows, d_in], +1 or -1: of some rows of matrix e."""
        mask = self.mask[e, rows]
        ones = torch.ones(max(len(mask), self._shape[-1]), device=mask.device)
        zeros = torch.zeros(len(mask), self._shape[-1], device=mask.device)
        return rebuild_tensor(zeros, [ComponentTensors(mask, ones[: len(mask)], ones[: self._shape[-1]], True)])

    def to_component(self) -> Component:
        """The component as the file stores it."""
        with torch.no_grad():
            mask = self.mask.cpu().numpy().copy().reshape(self._mask_shape)
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

    @torch.no_grad()
    def round(self) -> None:
        """Set the relative scales so that the scales equal the rounded ones of the file."""
        component = self.to_component()
        for name, array in component.scales().items():
            start = getattr(self, f"{name}_start").double()
            exact = torch.from_numpy(array.astype(np.float64)).to(start.device)
            if name != "col" or component.axis is Axis.COL:
                exact = exact * 2.0**component.exponent
            relative = torch.where(start > 0, exact / start - 1, torch.zeros_like(exact))
            getattr(self, name).copy_(relative.float())


class BuiltWeights:
    """The weights that parametrizations have built and that are still in use, by the address of their memory."""

    def __init__(self) -> None:
        self._built: dict[int, tuple[weakref.ref[Tensor], DeltaParametrization, Tensor]] = {}
        self._experts: list[tuple[DeltaParametrization, Tensor]] = []

    def add(self, weight: Tensor, builder: DeltaParametrization, base: Tensor) -> None:
        address = weight.untyped_storage().data_ptr()

        def gone(reference: weakref.ref[Tensor]) -> None:
            if address in self._built and self._built[address][0] is reference:
                del self._built[address]

        self._built[address] = weakref.ref(weight, gone), builder, base

    def build(self, builder: DeltaParametrization, base: Tensor) -> Tensor:
        """The weight. The last two of experts in one parameter are kept, because a model reads them once an expert."""
        if base.dim() != 3:
            return builder.build(base)
        for its, weight in self._experts:
            if its is builder:
                return weight.detach()
        self._experts = [*self._experts[-1:], (builder, builder.build(base))]
        return self._experts[-1][1].detach()

    def clear(self) -> None:
        """Forget the weights of experts: the scales have changed."""
        self._experts = []

    @contextmanager
    def forgotten(self) -> Iterator[None]:
        """A forward pass inside this context keeps no built weight for its backward pass, which builds it again."""
        with saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, saved: Tensor) -> Tensor | _Forgotten:
        found = self._built.get(saved.untyped_storage().data_ptr())
        if found is None or found[0]() is None:
            return saved
        _, builder, base = found
        view = tuple(saved.shape), saved.stride(), int(saved.storage_offset())
        return _Forgotten(self, builder, base, *view)


@dataclass(frozen=True, slots=True)
class _Forgotten:
    """A view of a weight: the parametrization that builds it, and the view's shape, strides and offset."""

    built: BuiltWeights
    builder: DeltaParametrization
    base: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@torch.no_grad()
def _unpack(saved: Tensor | _Forgotten) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.built.build(saved.builder, saved.base).as_strided(saved.shape, saved.stride, saved.offset)


class DeltaParametrization(nn.Module):
    """Parametrization: base parameter -> base + components, rounded to `dtype`, in the dtype `result`.

    pieces: the checkpoint tensors in the parameter, each with the rows that its base has and its components.
    """

    def __init__(
        self,
        pieces: Sequence[tuple[ParameterSlice, int, nn.ModuleList]],
        dtype: torch.dtype,
        result: torch.dtype,
        built: BuiltWeights,
    ) -> None:
        super().__init__()
        self._pieces = [(piece, kept) for piece, kept, _ in pieces]
        self.components = nn.ModuleList(components for _, _, components in pieces)
        self._dtype, self._result, self._built = dtype, result, built

    def forward(self, base: Tensor) -> Tensor:
        inputs: list[Tensor] = []
        for component in self._each():
            row, col = component.factors()
            inputs += [row, col]
        weight: Tensor = _Weight.apply(self, self._built, base, *inputs)  # type: ignore[no-untyped-call]
        self._built.add(weight, self, base)
        return weight

    def _each(self) -> Iterator[TrainedComponent]:
        for components in self.components:
            yield from components  # type: ignore[misc]

    def _matrices(self, value: Tensor) -> Iterator[tuple[int, Tensor, Sequence[tuple[int, TrainedComponent]]]]:
        """Views of the matrices that have components: place in the batch of their tensor, rows, numbered components."""
        first = 0
        for (piece, kept), components in zip(self._pieces, self.components, strict=True):
            numbered: list[tuple[int, TrainedComponent]] = list(enumerate(components, first))  # type: ignore[arg-type]
            first += len(numbered)
            part = piece.select(value)[:kept]
            for e, matrix in enumerate(part.unsqueeze(0) if part.dim() == 2 else part.flatten(0, -3)):
                yield e, matrix, numbered

    def build(self, base: Tensor) -> Tensor:
        """The weight, a new tensor of the base's shape."""
        out = base.to(self._dtype, copy=True)
        factors = [component.factors() for component in self._each()]
        for (e, target, components), (_, source, _) in zip(self._matrices(out), self._matrices(base), strict=True):
            terms = [ComponentTensors(c.mask[e], factors[k][0][e], factors[k][1][e]) for k, c in components]
            rebuild_tensor(source, terms, out=target)
        return out.to(self._result)

    def gradients(self, gradient: Tensor) -> list[Tensor]:
        """The gradients of each component's row and col. gradient: the weight's. Those of signs go to their latents."""
        factors = [component.factors() for component in self._each()]
        found = [(torch.zeros_like(row), torch.zeros_like(col)) for row, col in factors]
        for e, matrix, components in self._matrices(gradient):
            if gradient.dim() == 3 and not matrix.any():
                continue  # the gradient is that of a product with another expert
            for k, component in components:
                row, col = factors[k][0][e], factors[k][1][e]
                for rows in row_blocks(*matrix.shape):
                    part = matrix[rows].float()
                    signed = component.signs(e, rows).mul_(part)
                    found[k][0][e, rows] = signed @ col
                    found[k][1][e] += row[rows] @ signed
                    if component.latents is not None and not component.latents.at_rest:
                        component.latents.add(e, rows, part * (row[rows].unsqueeze(-1) * col))
        return [value for its in found for value in its]


class _Weight(torch.autograd.Function):
    """The weight of a parametrization, as a function of its scales."""

    @staticmethod
    def forward(ctx: Any, builder: DeltaParametrization, built: BuiltWeights, base: Tensor, *inputs: Tensor) -> Tensor:
        ctx.builder = builder
        return built.build(builder, base)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, None, None, *ctx.builder.gradients(gradient)


class TrainedTensor(nn.Module):
    """Parametrization: a tensor with the encoding full -> tensor + rms * theta, rounded to its dtype."""

    def __init__(self, value: Tensor, dtype: DType) -> None:
        super().__init__()
        self._dtype = dtype
        self._unit = float(value.float().square().mean().sqrt())
        self.theta = nn.Parameter(torch.zeros_like(value, dtype=torch.float32))

    def forward(self, value: Tensor) -> Tensor:
        moved = value.float() + self._unit * self.theta
        rounded = moved.detach().to(TORCH_DTYPES[self._dtype]).float()
        return (moved + (rounded - moved).detach()).to(value.dtype)

    @torch.no_grad()
    def to_array(self, value: Tensor) -> Array:
        """The tensor as the file stores it. value: the original tensor."""
        return storage_array(self(value.float()).to(TORCH_DTYPES[self._dtype]).cpu().contiguous())
