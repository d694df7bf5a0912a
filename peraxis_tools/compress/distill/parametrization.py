"""The parametrizations that distillation trains, registered on the student's own parameters.

    signed tensor   W = base + sum_k B_k o (row_k col_k^T)      row = row_0 (1 + theta), so is col
                    B = sign(z) where signs are trained, z a latent for each weight
    full tensor     W = W_0 + rms(W_0) theta                    embeddings, lm_head, norms, biases

W is rounded to its dtype as apply rounds it; gradients pass through roundings and signs (straight-through).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from peraxis_format import Array, Axis, Component, DType, encode_scale_pair, encode_scales, pack_signs, unpack_signs
from peraxis_format.ops.tensors import TORCH_DTYPES, storage_array
from peraxis_tools.parameter_names import ParameterSlice

__all__ = ["DeltaParametrization", "TrainedComponent", "TrainedTensor"]

_CLIP = 3.0  # a latent further than this many scales from zero gets no gradient


class TrainedComponent(nn.Module):
    """One component with relative scales, and latents if signs are trained."""

    def __init__(self, component: Component, d_in: int, *, signs: bool, device: torch.device) -> None:
        super().__init__()
        self.axis = component.axis
        factor = 2.0**component.exponent
        unpacked = torch.from_numpy(unpack_signs(component.mask, d_in)).to(device)
        for name, array in component.scales().items():
            scale = torch.from_numpy(array.astype(np.float32)).to(device)
            # For row+col the exponent may go into either vector, because both are trained relatively.
            if name != "col" or component.axis is Axis.COL:
                scale = scale * factor
            self.register_buffer(f"{name}_start", scale)
            self.register_parameter(name, nn.Parameter(torch.zeros_like(scale)))
        self.signs: Tensor
        self.register_buffer("signs", unpacked)
        # Latents start half a scale from zero, so that a gradient can flip a sign but noise cannot.
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

    def to_component(self) -> Component:
        """The component as the file stores it."""
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

    @torch.no_grad()
    def round(self) -> None:
        """Set the relative scales so that the scales equal the rounded ones of the file."""
        component = self.to_component()
        for name, array in component.scales().items():
            exact = torch.from_numpy(array.astype(np.float64)).to(self.signs.device)
            if name != "col" or component.axis is Axis.COL:
                exact = exact * 2.0**component.exponent
            start = getattr(self, f"{name}_start").double()
            relative = torch.where(start > 0, exact / start - 1, torch.zeros_like(exact))
            getattr(self, name).copy_(relative.float())


class DeltaParametrization(nn.Module):
    """Parametrization: base parameter -> base + components, rounded to the module's dtype (gradient passes through)."""

    def __init__(self, pieces: Sequence[tuple[ParameterSlice, int, nn.ModuleList]], dtype: torch.dtype) -> None:
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
