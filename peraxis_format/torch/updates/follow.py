"""apply_update: apply one exact update to a live model, atomically.

An update is proven before a weight is written: payload digests, decoding, and the digest of what each tensor becomes,
which also says that it is in the state that the update was made on. Then it is written, under the caller's lock. So an
update is applied whole or not at all, never twice and never out of order. What is staged is the update's own bytes and
a block of 2^20 weights (on a GPU 2^24), not a tensor; an anchor is held whole.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peraxis_format.delta import Encoding, ModuleDelta
from peraxis_format.dtypes import Array, raw_bytes
from peraxis_format.errors import LiveModelError, PxdError, fail
from peraxis_format.ops.tensors import storage_array
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.place.binding import agree
from peraxis_format.torch.place.finder import named
from peraxis_format.torch.place.placement import place
from peraxis_format.torch.place.shards import Placement, Shard, Target, increment_versions, whole
from peraxis_format.torch.updates.apply_sharded import apply_sharded
from peraxis_format.torch.updates.pieces import is_dtensor
from peraxis_format.torch.updates.proof import check_digest, stretches

__all__ = ["UpdateError", "apply_update", "in_pieces"]


class UpdateError(LiveModelError):
    """An update does not continue the model's state; the message names it and the reason."""


@torch.no_grad()
def apply_update(
    target: Target,
    update: DeltaFile | str | Path,
    *,
    lock: AbstractContextManager[Any] | None = None,
    shards: Mapping[str, Shard] | None = None,
    group: Any = None,
) -> None:
    """Apply one exact update, or an anchor, to a live model in place and atomically.

    target: a module, or a mapping of names to tensors, on any device. lock: held while weights are written. A model of
    DTensors, or with `shards` (names whose tensors are a plain local shard), is sharded: every rank of the group calls
    this, and all of them have the new state afterwards, or none.
    Raises PxdError if the file is damaged or the model is in another state (E404, E405), LiveModelError if the model
    cannot take the update. The model is then unchanged.
    """
    pieces = in_pieces(target, shards)
    with contextlib.ExitStack() as stack:
        failure: Exception | None = None
        try:
            file = update if isinstance(update, DeltaFile) else stack.enter_context(DeltaFile(update))
            placement = place(target, file.manifest, shards=shards, exact=True)
            _refuse_others(file, placement, pieces=pieces)
        except (PxdError, LiveModelError, OSError) as error:
            if not pieces:
                raise
            failure = error
        if pieces:
            agree(failure, group)
            apply_sharded(file, placement, lock=lock, group=group)
            increment_versions(part for parts in placement.values() for part in parts)
            return
        modules = list(_proven(file, placement))
        with lock or contextlib.nullcontext(), torch.no_grad():
            _write(modules, placement)
        increment_versions(part for parts in placement.values() for part in parts)


def in_pieces(target: Target, shards: Mapping[str, Shard] | None) -> bool:
    """Whether the model is sharded over ranks."""
    return bool(shards) or any(map(is_dtensor, named(target).values()))


def _refuse_others(file: DeltaFile, placement: Placement, *, pieces: bool) -> None:
    """Raise UpdateError unless this is an exact update of contiguous tensors."""
    for entry in file.manifest.modules:
        if entry.encoding is Encoding.SIGN or (entry.base is not None and entry.base.dtype is not entry.dtype):
            raise UpdateError(f"{file.path}: {entry.name} is not an exact update; use apply_ or VariantSwitch")
        for part in () if pieces else placement[entry.name]:
            if part.box != whole(entry.shape) or not part.view.is_contiguous():
                raise UpdateError(f"{entry.name}: is strided, which exact updates do not support")


def _proven(file: DeltaFile, placement: Placement) -> Iterator[ModuleDelta]:
    """Yield the modules to write, read once, after the digests of their old and new tensors are checked."""
    for entry in file.manifest.modules:
        module = file.load(entry.name)
        for part in placement[entry.name]:
            if entry.encoding is Encoding.EXACT:
                digest = hashlib.sha256()
                for _, stretch in stretches(part.view, module):
                    digest.update(raw_bytes(storage_array(stretch.cpu())))
                if digest.hexdigest() != entry.result:
                    fail("E405", field=entry.name)  # SPEC 7.4
            elif entry.base is not None:
                check_digest(entry, part.view)
        if entry.encoding is not Encoding.SAME:
            yield module


def _write(modules: list[ModuleDelta], placement: Placement) -> None:
    for module in modules:
        for part in placement[module.name]:
            if module.full is not None:
                part.view.copy_(_tensor(module.full.copy(), part.view))
            for live, stretch in stretches(part.view, module):
                live.copy_(stretch)
            part.publish()


def _tensor(array: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(array.reshape(-1).view("u1")).view(like.dtype).reshape(like.shape)
