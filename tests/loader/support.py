"""Random deltas for any set of base tensors, written by DeltaWriter, and the reference results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peraxis_format as pf
from peraxis_format.dtypes import Array
from peraxis_format.ops.tensors import dtype_of, storage_array
from peraxis_format.torch import apply_

AXES = tuple(pf.Axis)


def random_component(rng: np.random.Generator, axis: pf.Axis, shape: tuple[int, ...], size: float) -> pf.Component:
    """Return a component with random signs and scales around `size`."""
    mask = pf.pack_signs(rng.random(shape) < 0.5)

    def scale(dims: tuple[int, ...]) -> Array:
        return rng.uniform(0.5, 1.5, dims)

    row, col, scalar, exponent = None, None, None, 0
    if axis is pf.Axis.ROW:
        row, exponent = pf.encode_scales(size * scale(shape[:-1]))
    elif axis is pf.Axis.COL:
        col, exponent = pf.encode_scales(size * scale((*shape[:-2], shape[-1])))
    elif axis is pf.Axis.TENSOR:
        scalar, exponent = pf.encode_scales(size * scale((1,)))
    else:
        row, col, exponent = pf.encode_scale_pair(size * scale(shape[:-1]), scale((*shape[:-2], shape[-1])))
    return pf.Component(axis=axis, exponent=exponent, mask=mask, row=row, col=col, scalar=scalar)


def random_module(
    name: str, base: Tensor, rng: np.random.Generator, axes: Sequence[pf.Axis], encoding: pf.Encoding
) -> pf.ModuleDelta:
    """Return a module with the shape and dtype of the base. A `full` module holds the base plus noise."""
    dtype, shape = dtype_of(base, name), tuple(base.shape)
    array = storage_array(base.detach().contiguous())
    ref = pf.BaseRef(dtype=dtype, shape=shape, sha256=pf.digest_of(array))
    components: tuple[pf.Component, ...] = ()
    full = None
    if encoding is pf.Encoding.SIGN:
        components = tuple(random_component(rng, axis, shape, 0.02) for axis in axes)
    elif encoding is pf.Encoding.FULL:
        noise = torch.from_numpy(rng.normal(scale=0.05, size=shape).astype(np.float32))
        full = storage_array((base.detach().float() + noise).to(base.dtype)).copy()
    return pf.ModuleDelta(
        name=name, shape=shape, dtype=dtype, encoding=encoding, base=ref, components=components, full=full
    )


def write_delta(
    path: Path,
    base: Mapping[str, Tensor],
    *,
    seed: int = 0,
    axes: Sequence[pf.Axis] | None = None,
    components: int = 1,
    tied: Mapping[str, str] | None = None,
    same: Sequence[str] = (),
    full: Sequence[str] = (),
) -> Path:
    """Write a delta: matrices `sign` (axes in turn, or the given ones), vectors `full`, names in `same` unchanged."""
    rng = np.random.default_rng(seed)
    with pf.DeltaWriter(
        path, base=pf.Identity(id="base"), fine_tuned=pf.Identity(id=f"variant-{seed}")
    ) as writer:  # fmt: skip
        for i, (name, tensor) in enumerate(base.items()):
            if tied and name in tied:
                continue
            chosen = axes or [AXES[(i + k + seed) % len(AXES)] for k in range(components)]
            encoding = pf.Encoding.SIGN if tensor.ndim >= 2 and name not in full else pf.Encoding.FULL
            if name in same:
                encoding = pf.Encoding.SAME
            writer.add(random_module(name, tensor, rng, chosen, encoding))
        for alias, name in sorted((tied or {}).items()):
            writer.tie(name, alias)
        writer.finish()
    return path


def expected_bytes(path: Path, base: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return name -> bytes that the reference rebuilds, including aliases."""
    out: dict[str, bytes] = {}
    with pf.open(path) as delta:
        for name in delta:
            array = storage_array(base[name].detach().contiguous())
            out[name] = pf.reconstruct(delta.load(name), array, backend="numpy").tobytes()
        for name, alias in delta.manifest.tied:
            out[alias] = out[name]
    return out


def bytes_of(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return name -> raw bytes of tensors."""
    return {name: storage_array(tensor.detach().cpu().contiguous()).tobytes() for name, tensor in tensors.items()}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters under all their names."""
    return dict(model.named_parameters(remove_duplicate=False))


class Small(nn.Module):
    """Two linears (one with an odd width), an embedding, a norm, a bias and an optional tied head."""

    def __init__(self, *, dtype: torch.dtype = torch.bfloat16, tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(37, 24)
        self.first = nn.Linear(24, 43)
        self.norm = nn.LayerNorm(43)
        self.second = nn.Linear(43, 24, bias=False)
        self.head = nn.Linear(24, 37, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        hidden = hidden + self.second(torch.relu(self.norm(self.first(hidden))))
        return self.head(hidden)


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every tensor of a model."""
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


def refused(model: Any, path: Path, error: type[Exception], match: str, **options: Any) -> None:
    """Check that apply_ raises this error and leaves the model unchanged."""
    before = bytes_of(dict(model) if isinstance(model, dict) else named_tensors(model))
    with pytest.raises(error, match=match):
        apply_(model, path, **options)
    assert before == bytes_of(dict(model) if isinstance(model, dict) else named_tensors(model))
