"""Step 12 of SPEC 8 on a live model: check that its weights are the base of the delta.

Every storage is hashed once (digests.py). If ranks have only pieces of a tensor, the pieces are sent to one rank, in
turns, which hashes the whole. Copies of a piece are sent once, and compared (replicas.py). Nothing is written before
all ranks agree.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from peraxis_format.binding import check_base_digest
from peraxis_format.dtypes import Array, digest_of
from peraxis_format.errors import BindingError, LiveModelError, PxdError
from peraxis_format.manifest import Manifest, ModuleEntry
from peraxis_format.ops.tensors import as_bytes, storage_array
from peraxis_format.torch.place.digests import digests
from peraxis_format.torch.place.replicas import check_replicas
from peraxis_format.torch.place.shards import Box, Placement, ShardView, whole
from peraxis_format.torch.ring import Ring

__all__ = ["agree", "check_live", "is_sharded", "rank_and_count", "sharded_anywhere"]


def is_sharded(placement: Placement, manifest: Manifest) -> bool:
    """Whether some module is only partly on this rank."""
    return any(part.box != whole(entry.shape) for entry in manifest.modules for part in placement[entry.name])


def check_live(
    manifest: Manifest,
    placement: Placement,
    *,
    ring: Ring,
    workers: int | None = None,
    group: Any = None,
    known: Mapping[str, str] | None = None,
) -> None:
    """Check the bytes of every base tensor (SPEC 7.3).

    ring: the reserved ring of their device. group: the torch.distributed group whose ranks have the pieces of sharded
    tensors (default: all ranks). known: hex digests of base tensors that were checked before; their weights are not
    read. Raises BindingError (E404) for the first module that differs, on all ranks.
    """
    known = known or {}
    for entry in manifest.modules:
        if entry.base is not None and entry.name in known:
            try:
                check_base_digest(entry, known[entry.name])
            except PxdError as failure:
                raise _named(failure, manifest) from None
    bound = [entry for entry in manifest.modules if entry.base is not None and entry.name not in known]
    local = [(entry, part) for entry in bound for part in placement[entry.name] if part.box == whole(entry.shape)]
    piece = next((e for e in bound if any(part.box != whole(e.shape) for part in placement[e.name])), None)
    error: Exception | None = None
    try:
        views = [part.view for _, part in local]
        with contextlib.closing(digests(views, device=ring.device, ring=ring, workers=workers)) as found:
            for (entry, _), digest in zip(local, found, strict=True):
                check_base_digest(entry, digest)
    except PxdError as failure:
        error = _named(failure, manifest)
    if sharded_anywhere(here=piece is not None, group=group):
        try:
            _check_pieces(bound, placement, group)
        except PxdError as failure:
            error = error or _named(failure, manifest)
        agree(error, group)
    elif error is not None:
        raise error
    elif piece is not None:
        raise LiveModelError(f"{piece.name}: only a piece of it is on this rank; initialise torch.distributed")


def _named(failure: PxdError, manifest: Manifest) -> PxdError:
    """The error with the name of the delta's base."""
    base = manifest.base
    revision = f" at revision {base.revision}" if base.revision else ""
    detail = f"; {failure.detail}" if failure.detail else ""
    return BindingError(failure.code, f"the delta was made for {base.id}{revision}{detail}", field=failure.field)


# --- pieces on several ranks ---------------------------------------------------------------------------


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sharded_anywhere(*, here: bool, group: Any = None) -> bool:
    """Whether any rank has only a part of a module, so that all ranks have to act together."""
    if not _distributed():
        return False
    return any(_gathered(here, group))


def _gathered(value: Any, group: Any) -> list[Any]:
    world = torch.distributed.get_world_size(group)
    if world == 1:
        return [value]
    out: list[Any] = [None] * world
    torch.distributed.all_gather_object(out, value, group=group)
    return out


def rank_and_count(group: Any = None) -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without torch.distributed."""
    if not _distributed():
        return 0, 1
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def agree(error: BaseException | None, group: Any = None) -> None:
    """Raise on every rank if one rank has an error: the rank's own error, else that of the first other rank."""
    if not _distributed():
        if error is not None:
            raise error
        return
    failures = [(rank, failure) for rank, failure in enumerate(_gathered(error, group)) if failure is not None]
    if error is not None:
        raise error
    if failures:
        raise failures[0][1]


@dataclass(frozen=True, slots=True)
class _Message:
    """A piece of a tensor that one rank sends: its box and the rank."""

    rank: int
    box: Box


def _check_pieces(bound: Sequence[ModuleEntry], placement: Placement, group: Any) -> None:
    """Assemble each module that is sharded on one rank, which differs each time, and hash it there.

    The first failure is raised last. Raises LiveModelError if the ranks do not have all of a tensor.
    """
    failure: PxdError | None = None
    rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    boxes = _gathered({entry.name: placement[entry.name][0].box for entry in bound}, group)
    # One rank may have all of a short tensor, so what is sharded is known from all ranks.
    pieces = [entry for entry in bound if any(found[entry.name] != whole(entry.shape) for found in boxes)]
    for turn, entry in enumerate(pieces):
        owner = turn % world
        # Replicated pieces are sent once.
        senders = {b[entry.name]: r for r, b in reversed(list(enumerate(boxes)))}
        messages = [_Message(r, box) for box, r in sorted(senders.items()) if _volume(box)]
        covered = sum(_volume(message.box) for message in messages)
        if covered != math.prod(entry.shape):  # equal on all ranks
            raise LiveModelError(
                f"{entry.name}: the ranks have {covered} of its {math.prod(entry.shape)} weights; check `shards`"
            )
        part = placement[entry.name][0]
        if rank == owner:
            full = _assembled(entry, messages, part, group)
            try:
                check_base_digest(entry, digest_of(full))
            except PxdError as error:
                failure = failure or error
            continue
        for message in messages:
            if message.rank == rank:
                torch.distributed.send(as_bytes(part.view), dst=_global(owner, group), group=group)
    check_replicas({entry.name: placement[entry.name][0] for entry in pieces}, boxes, partial(_gathered, group=group))
    if failure is not None:
        raise failure


def _global(rank: int, group: Any) -> int:
    return rank if group is None else torch.distributed.get_global_rank(group, rank)


def _volume(box: Box) -> int:
    return math.prod(end - begin for begin, end in box)


def _assembled(entry: ModuleEntry, messages: Sequence[_Message], mine: ShardView, group: Any) -> Array:
    """The whole tensor, from the pieces of all ranks."""
    rank = torch.distributed.get_rank(group)
    full = np.empty(entry.shape, entry.dtype.storage)
    for message in messages:
        shape = tuple(end - begin for begin, end in message.box)
        if message.rank == rank:
            data = as_bytes(mine.view)
        else:
            size = entry.dtype.size_of(shape)
            data = torch.empty(size, dtype=torch.uint8, device=mine.view.device)
            torch.distributed.recv(data, src=_global(message.rank, group), group=group)
        where = tuple(slice(begin, end) for begin, end in message.box)
        full[where] = storage_array(data.cpu()).view(entry.dtype.storage).reshape(shape)
    return full
