"""Sharded tensors: the box of each rank, assembled rows on one rank, and changes that are sent back.

No rank has a whole sharded tensor. Ranks take turns: the owner of a tensor sees a range of its rows at a time, and
sends changes back as flat indices and values. All functions with a group are collective: every rank of it calls them in
the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from peraxis_format.dtypes import Array, DType
from peraxis_format.ops.tensors import as_bytes, storage_array
from peraxis_format.torch.place.shards import Box

__all__ = [
    "Layout",
    "Ranks",
    "boxed_indices",
    "exchanged",
    "flat_indices",
    "is_dtensor",
    "row_stretches",
    "rows_on",
    "slices",
]


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of a group, and the rank of this process."""

    group: Any = None

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return distributed.get_rank(self.group)

    @property
    def count(self) -> int:
        """The number of ranks."""
        return distributed.get_world_size(self.group)

    def world(self, rank: int) -> int:
        """The global rank of a rank of the group."""
        return rank if self.group is None else distributed.get_global_rank(self.group, rank)

    def gathered(self, value: Any) -> list[Any]:
        """The value of each rank, on every rank."""
        out: list[Any] = [None] * self.count
        distributed.all_gather_object(out, value, group=self.group)
        return out

    def collected(self, value: Any, *, on: int) -> list[Any]:
        """The value of each rank, on one rank; an empty list on the others."""
        out: list[Any] | None = [None] * self.count if self.rank == on else None
        distributed.gather_object(value, out, dst=self.world(on), group=self.group)
        return out or []

    def said_by(self, value: Any, *, rank: int) -> Any:
        """One rank's value, on every rank."""
        box = [value]
        distributed.broadcast_object_list(box, src=self.world(rank), group=self.group)
        return box[0]


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
            if math.prod(end - begin for begin, end in box):
                senders.setdefault(box, rank)
        return cls(tuple(shape), dict(sorted(senders.items())))

    @property
    def row(self) -> int:
        """The number of weights of one index of the first dimension."""
        return math.prod(self.shape[1:])

    @property
    def covered(self) -> int:
        """The number of weights that some rank has."""
        return sum(math.prod(end - begin for begin, end in box) for box in self.senders)


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    return getattr(tensor, "placements", None) is not None


def slices(box: Box) -> tuple[slice, ...]:
    """A box as an index."""
    return tuple(slice(begin, end) for begin, end in box)


def row_stretches(layout: Layout, weights: int) -> Iterator[tuple[slice, slice]]:
    """A tensor in ranges of `weights`: flat ranges, each with the rows of the first dimension that it touches."""
    total = math.prod(layout.shape)
    for begin in range(0, max(total, 1), weights):
        end = min(begin + weights, total)
        yield slice(begin, end), slice(begin // max(layout.row, 1), -(-end // max(layout.row, 1)))


def rows_on(
    ranks: Ranks, owner: int, layout: Layout, rows: slice, *, mine: Tensor, box: Box, dtype: DType
) -> Array | None:
    """Rows of the first dimension, assembled on the owner as a storage array; None on the other ranks.

    mine: this rank's piece; box: its box. A scalar has no rows, so it is taken whole.
    """
    out: Array | None = None
    if ranks.rank == owner:
        out = np.zeros((rows.stop - rows.start, *layout.shape[1:]) if layout.shape else (), dtype.storage)
    for piece, sender in layout.senders.items():
        begin, end = (max(rows.start, piece[0][0]), min(rows.stop, piece[0][1])) if piece else (0, 1)
        if begin >= end or ranks.rank not in (sender, owner):
            continue
        if ranks.rank == sender:
            part = mine.detach()[begin - box[0][0] : end - box[0][0]] if box else mine.detach()
            if out is None:
                distributed.send(as_bytes(part), dst=ranks.world(owner), group=ranks.group)
                continue
            data = as_bytes(part)
        else:
            size = dtype.itemsize * (end - begin) * math.prod(last - first for first, last in piece[1:])
            data = torch.empty(size, dtype=torch.uint8, device=mine.device)
            distributed.recv(data, src=ranks.world(sender), group=ranks.group)
        if out is not None:
            where = (slice(begin - rows.start, end - rows.start), *slices(piece[1:])) if piece else ()
            out[where] = storage_array(data.cpu()).view(dtype.storage).reshape(out[where].shape)
    return out


def flat_indices(local: NDArray[np.int64], box: Box, shape: Sequence[int]) -> NDArray[np.int64]:
    """Convert flat indices within a box to flat indices within the tensor."""
    if not box:
        return local
    inside = np.unravel_index(local, tuple(end - begin for begin, end in box))
    moved = tuple(part + begin for part, (begin, _) in zip(inside, box, strict=True))
    return np.ravel_multi_index(moved, tuple(shape)).astype(np.int64)


def boxed_indices(
    flat: NDArray[np.int64], box: Box, shape: Sequence[int]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """A mask of the flat indices of a tensor that are in a box, and these as flat indices within the box."""
    if not box:
        return np.ones(flat.size, np.bool_), flat
    parts = np.unravel_index(flat, tuple(shape))
    within = np.ones(flat.size, np.bool_)
    for part, (begin, end) in zip(parts, box, strict=True):
        within &= (part >= begin) & (part < end)
    moved = tuple(part[within] - begin for part, (begin, _) in zip(parts, box, strict=True))
    return within, np.ravel_multi_index(moved, tuple(end - begin for begin, end in box)).astype(np.int64)


def exchanged(ranks: Ranks, outgoing: Sequence[Any]) -> list[Any]:
    """Send one value to each rank. Returns the values that all ranks sent to this one, in rank order."""
    incoming: list[Any] = []
    for rank in range(ranks.count):
        found = ranks.collected(outgoing[rank], on=rank)
        if rank == ranks.rank:
            incoming = found
    return incoming
