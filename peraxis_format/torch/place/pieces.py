"""Sharded tensors: the box of each rank, assembled rows on one rank, and changes that are sent back.

No rank has a whole sharded tensor. Ranks take turns: the owner of a tensor sees a range of its rows at a time, and
sends changes back as flat indices and values. All functions with ranks are collective: every rank of the group calls
them in the same order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from peraxis_format.dtypes import Array, DType, raw_bytes
from peraxis_format.errors import LiveModelError
from peraxis_format.manifest import ModuleEntry
from peraxis_format.ops.exact import BLOCK
from peraxis_format.ops.tensors import as_bytes, storage_array
from peraxis_format.torch.place.finder import named
from peraxis_format.torch.place.ranks import KeptError, Ranks, raise_first, sendable
from peraxis_format.torch.place.replicas import odd_replica
from peraxis_format.torch.place.shards import Box, Shard, ShardView, Target, extent, slices

__all__ = [
    "Layout",
    "assembled",
    "assembled_digest",
    "boxed_indices",
    "flat_indices",
    "in_pieces",
    "is_dtensor",
    "sharded_digest",
]

_STRETCH: Final = 16 * BLOCK  # weights to assemble at a time


@dataclass(frozen=True, slots=True)
class Layout:
    """The boxes of one tensor. senders: for each box that is not empty, the first rank that has it."""

    shape: tuple[int, ...]
    senders: Mapping[Box, int]

    @classmethod
    def of(cls, shape: Sequence[int], boxes: Sequence[Box]) -> Layout:
        """boxes: the box of each rank."""
        senders: dict[Box, int] = {}
        for rank, box in enumerate(boxes):
            if math.prod(extent(box)):
                senders.setdefault(box, rank)
        return cls(tuple(shape), dict(sorted(senders.items())))

    @property
    def row(self) -> int:
        """The number of weights of one index of the first dimension."""
        return math.prod(self.shape[1:])

    def check_complete(self, name: str, remedy: str) -> None:
        """Raise LiveModelError, with this remedy, unless the ranks have the whole tensor between them."""
        found, wanted = sum(math.prod(extent(box)) for box in self.senders), math.prod(self.shape)
        if found != wanted:
            raise LiveModelError(f"{name}: the ranks have {found} of its {wanted} weights; {remedy}")


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    return getattr(tensor, "placements", None) is not None


def in_pieces(target: Target, shards: Mapping[str, Shard] | None) -> bool:
    """Whether a model is sharded over ranks."""
    return bool(shards) or any(map(is_dtensor, named(target).values()))


def assembled(
    ranks: Ranks, owner: int, layout: Layout, shard: ShardView, dtype: DType, failure: KeptError
) -> Iterator[tuple[slice, Array | None]]:
    """Yield the flat ranges of a tensor, each with its weights: a writable storage array on the owner, None elsewhere.

    A range is of whole blocks of the exact encoding: 2^20 weights, or a row of the first dimension if that is longer.
    failure: keeps the errors of this rank, so that it goes on; the weights are then None, or wrong. Without memory for
    pieces on some rank, which keeps that error, nothing is yielded on any.
    """
    total, row = math.prod(layout.shape), max(layout.row, 1)
    length = max(_STRETCH, -(-row // BLOCK) * BLOCK)  # so that a row is sent at most twice
    buffer: Tensor | None = None
    with failure:
        buffer = _buffer(layout, dtype, rows=min(total // row, length // row + 2), device=shard.view.device)
    room = ranks.all_gather(buffer is not None)
    if buffer is None or not all(room):
        return
    for begin in range(0, max(total, 1), length):
        end = min(begin + length, total)
        rows = slice(begin // row, -(-end // row))
        found = _rows_on(
            ranks, owner, layout, rows, mine=shard.view, box=shard.box, dtype=dtype, buffer=buffer, failure=failure
        )
        first = rows.start * row
        yield slice(begin, end), None if found is None else found.reshape(-1)[begin - first : end - first]


def assembled_digest(
    ranks: Ranks, owner: int, layout: Layout, shard: ShardView, dtype: DType, failure: KeptError
) -> str | None:
    """The hex digest of a sharded tensor, on the owner; None elsewhere. failure: see `assembled`."""
    digest = hashlib.sha256()
    for _, weights in assembled(ranks, owner, layout, shard, dtype, failure):
        with failure:
            if weights is not None:
                digest.update(raw_bytes(weights))
    return digest.hexdigest() if ranks.rank == owner else None


def sharded_digest(entry: ModuleEntry, shard: ShardView, turn: int, group: Any) -> str:
    """The hex digest of a sharded live tensor, on every rank; empty if copies of a piece differ. Collective."""
    ranks, failure = Ranks(group), KeptError()
    boxes = ranks.all_gather({entry.name: shard.box})
    if odd_replica({entry.name: shard}, boxes, ranks.all_gather) is not None:
        return ""
    layout = Layout.of(entry.shape, [each[entry.name] for each in boxes])
    owner = turn % ranks.count
    mine = assembled_digest(ranks, owner, layout, shard, entry.dtype, failure)
    found = ranks.all_gather(mine if failure.error is None else sendable(failure.error))
    raise_first(found, failure.error)
    digest: str = found[owner]
    return digest


def _buffer(layout: Layout, dtype: DType, *, rows: int, device: torch.device) -> Tensor:
    """Room for the largest piece of this many rows, as bytes."""
    widths = (math.prod(extent(piece[1:])) for piece in layout.senders)
    return torch.empty(dtype.itemsize * rows * max(widths, default=0), dtype=torch.uint8, device=device)


def _rows_on(
    ranks: Ranks,
    owner: int,
    layout: Layout,
    rows: slice,
    *,
    mine: Tensor,
    box: Box,
    dtype: DType,
    buffer: Tensor,
    failure: KeptError,
) -> Array | None:
    """Rows of the first dimension, assembled on the owner as a storage array; None on the other ranks.

    mine: this rank's piece; box: its box; buffer: for pieces of others. A scalar has no rows, so it is taken whole.
    A rank with an error sends and receives as many bytes as without it.
    """
    out: Array | None = None
    with failure:
        if ranks.rank == owner:
            out = np.zeros((rows.stop - rows.start, *layout.shape[1:]) if layout.shape else (), dtype.storage)
    for piece, sender in layout.senders.items():
        begin, end = (max(rows.start, piece[0][0]), min(rows.stop, piece[0][1])) if piece else (0, 1)
        if begin >= end or ranks.rank not in (sender, owner):
            continue
        data: Tensor | None = None
        if ranks.rank == sender:
            with failure:
                data = as_bytes(mine.detach()[begin - box[0][0] : end - box[0][0]] if box else mine.detach())
        if data is None:
            size = dtype.itemsize * (end - begin) * math.prod(last - first for first, last in piece[1:])
            data = buffer[:size]
        if sender != owner and ranks.rank == sender:
            distributed.send(data, dst=ranks.world(owner), group=ranks.group)
        elif sender != owner:
            distributed.recv(data, src=ranks.world(sender), group=ranks.group)
        with failure:
            if out is not None:
                where = (slice(begin - rows.start, end - rows.start), *slices(piece[1:])) if piece else ()
                out[where] = storage_array(data.cpu()).view(dtype.storage).reshape(out[where].shape)
    return out


def flat_indices(local: NDArray[np.int64], box: Box, shape: Sequence[int]) -> NDArray[np.int64]:
    """Convert flat indices within a box to flat indices within the tensor."""
    if not box:
        return local
    inside = np.unravel_index(local, extent(box))
    moved = tuple(at + begin for at, (begin, _) in zip(inside, box, strict=True))
    return np.ravel_multi_index(moved, tuple(shape)).astype(np.int64)


def boxed_indices(
    flat: NDArray[np.int64], box: Box, shape: Sequence[int]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """A mask of the flat indices of a tensor that are in a box, and these as flat indices within the box."""
    if not box:
        return np.ones(flat.size, np.bool_), flat
    axes = np.unravel_index(flat, tuple(shape))
    within = np.ones(flat.size, np.bool_)
    for axis, (begin, end) in zip(axes, box, strict=True):
        within &= (axis >= begin) & (axis < end)
    moved = tuple(axis[within] - begin for axis, (begin, _) in zip(axes, box, strict=True))
    return within, np.ravel_multi_index(moved, extent(box)).astype(np.int64)
