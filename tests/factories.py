"""Small random checkpoints and deltas, for tests that do not depend on their values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

import peraxis_format as pxd

__all__ = [
    "base_ref",
    "component",
    "dense_component",
    "modules_of",
    "random_storage",
    "sign_module",
    "write_checkpoint",
    "write_delta",
]


def random_storage(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: pxd.DType = pxd.DType.BF16, scale: float = 1.0
) -> pxd.Array:
    """Return normal weights of a float type as a storage array."""
    return pxd.from_float32((rng.standard_normal(shape) * scale).astype(np.float32), dtype)


def base_ref(array: pxd.Array, dtype: pxd.DType) -> pxd.BaseRef:
    """Return the manifest's reference to a base tensor."""
    return pxd.BaseRef(dtype=dtype, shape=array.shape, sha256=pxd.digest_of(array))


def component(rng: np.random.Generator, axis: pxd.Axis, covered: tuple[int, ...], scale: float = 1e-2) -> pxd.Component:
    """Return a component with random signs and scales."""
    mask = pxd.pack_signs(rng.random(covered) < 0.5)
    shapes = pxd.scale_shapes(axis, covered)
    values: dict[str, NDArray[np.float64]] = {name: rng.random(shape) * scale for name, shape in shapes.items()}
    if axis is pxd.Axis.ROW_COL:
        row, col, exponent = pxd.encode_scale_pair(values["row"], values["col"])
        return pxd.Component(axis=axis, exponent=exponent, mask=mask, row=row, col=col)
    (name, value), *_ = values.items()
    array, exponent = pxd.encode_scales(value)
    return pxd.Component(axis=axis, exponent=exponent, mask=mask, **{name: array})


def dense_component(component: pxd.Component, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the component's term, sign * scale, as float32 [..., d_out, d_in] (SPEC 5.3)."""
    terms = [
        np.where(pxd.unpack_signs(each.mask, shape[-1]), 1, -1) * np.outer(each.row, each.col)
        for each in component.factors(shape)
    ]
    return np.stack(terms).reshape(shape).astype(np.float32)


def sign_module(
    rng: np.random.Generator,
    name: str,
    base: pxd.Array,
    *,
    base_dtype: pxd.DType = pxd.DType.BF16,
    dtype: pxd.DType | None = None,
    axes: tuple[pxd.Axis, ...] = (pxd.Axis.ROW,),
    rows: int | None = None,
) -> pxd.ModuleDelta:
    """Return a random `sign` module on this base. rows: those of the fine-tuned tensor, for a resized vocabulary."""
    dtype = dtype or base_dtype
    shape = (rows if rows is not None else base.shape[0], *base.shape[1:])
    covered = (min(shape[0], base.shape[0]), *shape[1:])
    tail = random_storage(rng, (shape[0] - covered[0], *shape[1:]), dtype) if shape[0] > covered[0] else None
    return pxd.ModuleDelta(
        name=name,
        shape=shape,
        dtype=dtype,
        encoding=pxd.Encoding.SIGN,
        base=base_ref(base, base_dtype),
        components=tuple(component(rng, axis, covered) for axis in axes),
        tail=tail,
    )


def write_checkpoint(folder: Path, tensors: Mapping[str, tuple[pxd.Array, pxd.DType]]) -> Path:
    """Write a folder with model.safetensors, by safetensors itself, and config.json."""
    import torch
    from safetensors.torch import save_file as save_torch

    folder.mkdir(parents=True, exist_ok=True)
    if any(dtype is pxd.DType.BF16 for _, dtype in tensors.values()):
        kinds = {pxd.DType.BF16: torch.bfloat16}
        save_torch(
            {
                name: torch.from_numpy(array.copy()).view(kinds[dtype])
                if dtype in kinds
                else torch.from_numpy(array.copy())
                for name, (array, dtype) in tensors.items()
            },
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    else:
        save_file({name: array for name, (array, _) in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def write_delta(path: Path, modules: list[pxd.ModuleDelta], **options: object) -> Path:
    """Write a file of these modules. tied, dropped and assets are as in the methods of DeltaWriter."""
    with pxd.DeltaWriter(path, base=pxd.Identity(id="base"), fine_tuned=pxd.Identity(id="tuned")) as writer:
        for module in modules:
            writer.add(module)
        for pair in options.get("tied", ()):  # type: ignore[attr-defined]
            writer.tie(*pair)
        for name in options.get("dropped", ()):  # type: ignore[attr-defined]
            writer.drop(name)
        for name, data in options.get("assets", {}).items():  # type: ignore[attr-defined]
            writer.add_asset(name, data)
        writer.finish()
    return path


def modules_of(path: Path) -> dict[str, pxd.ModuleEntry]:
    """Return the entries of a delta, which is verified."""
    with pxd.open(path) as delta:
        delta.verify()
        return {module.name: module for module in delta.manifest.modules}


def large_pair(folder: Path) -> tuple[Path, Path]:
    """Write `large`, a base of three tensors of 1.3 MB, and `large.pxd` in the folder, for shards of 1 MB."""
    rng = np.random.default_rng(0)
    base = {f"model.layers.{i}.mlp.up_proj.weight": random_storage(rng, (1024, 640)) for i in range(3)}
    checkpoint = write_checkpoint(folder / "large", {name: (array, pxd.DType.BF16) for name, array in base.items()})
    modules = [sign_module(rng, name, array) for name, array in base.items()]
    return checkpoint, write_delta(folder / "large.pxd", modules, assets={"config.json": b'{"model_type": "llama"}'})
