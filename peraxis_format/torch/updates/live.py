"""The live parameters of a trainer: its arguments are checked, and the tensors are found and copied."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from peraxis_format.arguments import check_path, kind_of
from peraxis_format.dtypes import Array, DType
from peraxis_format.errors import ArgumentError, LiveModelError
from peraxis_format.ops.tensors import dtype_of, storage_array
from peraxis_format.torch.place.pieces import is_dtensor
from peraxis_format.torch.place.wrappers import checkpoint_names
from peraxis_format.urls import is_url

__all__ = ["check_publishing", "live_tensors", "published_array", "published_dtype"]

_LOGGER: Final = logging.getLogger("peraxis")


def check_publishing(model: object, folder: str | Path, dtype: object) -> None:
    """Raise ArgumentError unless a model, a folder or URL, and a floating-point dtype (or None) are given."""
    check_path("folder", folder)
    if not isinstance(model, nn.Module | Mapping):
        raise ArgumentError(f"model is {kind_of(model)}; pass a module, or a mapping of names to tensors")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ArgumentError(f"dtype {dtype!r}: must be a floating-point dtype, like torch.bfloat16, or None")
    if Path(folder).is_file():
        raise ArgumentError(f"{folder}: is a file; pass the folder of the chain")
    if not is_url(folder) and not (above := Path(folder).absolute().parent).is_dir():
        raise ArgumentError(f"{above}: no such folder; make it first")
    if isinstance(model, nn.Module) and any(kind.__name__ == "PeftModel" for kind in _kinds(model)):
        _LOGGER.warning(
            "the model has an adapter of PEFT beside its weights, so a server needs the same one; to publish a model "
            "that needs none, merge the adapter first (merge_and_unload)"
        )


def _kinds(model: nn.Module) -> set[type]:
    """The classes of a model and its modules, with those above them."""
    return {kind for module in model.modules() for kind in type(module).__mro__}


def live_tensors(
    model: nn.Module | Mapping[str, Tensor], *, in_pieces: bool
) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """The tensors by name, each storage once, and (module, alias) for further names. Names of a module are those of its
    checkpoint, without the words of wrappers.

    in_pieces: DTensors are allowed. Raises LiveModelError.
    """
    named = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else model
    names = checkpoint_names(model, named) if isinstance(model, nn.Module) else {}
    first: dict[tuple[object, ...], str] = {}
    live: dict[str, Tensor] = {}
    tied: list[tuple[str, str]] = []
    for own, tensor in named.items():
        if not isinstance(tensor, Tensor):
            continue
        name = names.get(own, own)
        if tensor.is_meta or tensor.layout is not torch.strided:
            kind = "on the meta device" if tensor.is_meta else str(tensor.layout)
            raise LiveModelError(f"{name}: {kind}, without dense weights; load or convert it first")
        if not tensor.numel():
            raise LiveModelError(
                f"{name}: has no elements (shape {list(tensor.shape)}), and no file can have it; pass a mapping of the "
                "other tensors"
            )
        if is_dtensor(tensor) and not in_pieces:
            raise LiveModelError(f"{name}: is sharded; use ShardedUpdateWriter, on every rank")
        key: tuple[object, ...] = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if is_dtensor(tensor):
            key = (id(tensor),)  # its address is not meaningful
        if key in first:
            tied.append((first[key], name))
            continue
        first[key] = name
        live[name] = tensor
    if not live:
        raise LiveModelError("the model has no tensors to publish")
    return live, tied


def published_array(tensor: Tensor, dtype: torch.dtype | None) -> Array:
    """The storage array that is published of a live tensor. dtype: that of float32 tensors; None leaves them."""
    plain = tensor.detach()
    if dtype is not None and plain.dtype is torch.float32:
        plain = plain.to(dtype)
    # A copy, because a storage array of live CPU memory would change with the parameters.
    return np.array(storage_array(plain.cpu().contiguous()))


def published_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> DType:
    """The dtype of `published_array`. Raises LiveModelError for one that PXD does not have."""
    if dtype is not None and tensor.dtype is torch.float32:
        return dtype_of(torch.empty(0, dtype=dtype), name)
    return dtype_of(tensor, name)
