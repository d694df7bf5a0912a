"""The loader's internal names that the plug-in needs; no other file here imports them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from peraxis_format.binding import check_base_bytes
from peraxis_format.delta import Encoding, ModuleDelta
from peraxis_format.errors import BindingError
from peraxis_format.ops.rebuild import rebuild_tensor, reconstruct
from peraxis_format.ops.rebuild.torch import ComponentTensors, Scratch
from peraxis_format.ops.signed_matmul import signed_matmul
from peraxis_format.ops.tensors import storage_array, torch_dtype
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.device import device_of
from peraxis_format.torch.place.binding import check_live
from peraxis_format.torch.place.claims import claim, release
from peraxis_format.torch.place.placement import place
from peraxis_format.torch.place.ranks import Ranks, agree, together
from peraxis_format.torch.place.shards import Placement
from peraxis_format.torch.ring import Ring
from peraxis_format.torch.serve.linear import many_rows
from peraxis_format.torch.serve.lookup import patched_rows
from peraxis_format.torch.swap.payload import check_pads
from peraxis_format.torch.updates.listing import UpdateFile, list_updates
from peraxis_format.torch.updates.source import next_update
from peraxis_format.torch.updates.staged import StagedUpdate, stage

__all__ = [
    "ComponentTensors",
    "Placement",
    "Ranks",
    "Scratch",
    "StagedUpdate",
    "UpdateFile",
    "agree",
    "check_base",
    "check_pads",
    "claim",
    "descriptor_of",
    "fine_tuned",
    "full_tensor",
    "list_updates",
    "many_rows",
    "next_update",
    "patched_rows",
    "place",
    "rebuild_tensor",
    "release",
    "signed_matmul",
    "stage",
    "together",
]

_CHECK_BYTES: Final = 32 << 20  # bytes of the ring buffer that reads weights from a CUDA device for hashing


def fine_tuned(base: Iterable[tuple[str, Tensor]], delta: DeltaFile) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the fine-tune from the base checkpoint's stream and a delta, with the bits of SPEC 6.

    One tensor is in memory at a time. The digests of base bytes and payload are checked before use.
    Raises BindingError if the base lacks a tensor or has other bytes; PayloadError.
    """
    names = delta.manifest.names()
    seen = set()
    for name, tensor in base:
        if name not in delta:
            continue  # SPEC 3.7: the manifest names every tensor of the fine-tune
        seen.add(name)
        yield from zip(names[name], repeat(_rebuilt(delta, name, tensor)))
    for name in delta:
        if name in seen:
            continue
        if delta.entry(name).base is not None:
            raise BindingError("E402", "the base checkpoint has no such tensor", field=name)
        yield from zip(names[name], repeat(_rebuilt(delta, name, None)))


def _rebuilt(delta: DeltaFile, name: str, base: Tensor | None) -> Tensor:
    entry = delta.entry(name)
    array = None if base is None else storage_array(base.contiguous())
    if array is not None and entry.base is not None:
        check_base_bytes(entry, array)
    module = delta.load(name)
    return _as_tensor(reconstruct(module, None if entry.encoding is Encoding.FULL else array), module)


def descriptor_of(file: DeltaFile) -> int:
    """A new descriptor of an open file."""
    return os.dup(file._file)


def full_tensor(module: ModuleDelta) -> Tensor:
    """A copy of the exact tensor of a `full` module."""
    return _as_tensor(np.array(module.full), module)


def _as_tensor(array: Any, module: ModuleDelta) -> Tensor:
    flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return flat.view(torch_dtype(module.dtype)).view(module.shape)


def check_base(delta: DeltaFile, placement: Placement, *, group: Any) -> None:
    """Check that the live weights are the delta's base, on every rank. Raises BindingError (E404) on all of them."""
    ring = Ring(device_of(placement))
    if ring.device.staged:
        ring.reserve(_CHECK_BYTES)
    check_live(delta.manifest, placement, ring=ring, group=group)
