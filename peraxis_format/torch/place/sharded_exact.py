"""Exact tensors of a sharded model: a rank decodes a tensor that it assembles in ranges, and sends its changes to all.

An exact block is decoded from the old weights of the whole block, and pieces of a tensor rarely consist of whole
blocks. So the owner of a tensor, which differs each time, decodes and hashes it, and every rank keeps the changes
within its own piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peraxis_format.delta import Encoding, ModuleDelta
from peraxis_format.dtypes import Array, DType, raw_bytes
from peraxis_format.errors import fail, located
from peraxis_format.manifest import ModuleEntry
from peraxis_format.ops.exact import BLOCK, apply
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.modes import allocates, writes
from peraxis_format.torch.place.pieces import Layout, assembled, boxed_indices
from peraxis_format.torch.place.ranks import KeptError, Ranks, agree, together
from peraxis_format.torch.place.shards import Box, Placement, ShardView, whole

__all__ = ["Changes", "ExactPiece", "exact_pieces", "in_box", "sharded_changes", "words_of"]

Changes = Sequence[tuple[NDArray[np.int64], Array]]
"""Flat places of a tensor, and the new patterns there as signed words; for each decoded range."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, eq=False)
class ExactPiece:
    """The changes of one rank's piece of an exact tensor. places: int64, within the piece; values: signed words."""

    name: str
    dtype: DType
    shard: ShardView
    places: Tensor
    values: Tensor

    @classmethod
    def cut(cls, entry: ModuleEntry, shard: ShardView, changes: Changes) -> ExactPiece:
        """The changes of a tensor within a shard's box."""
        return cls(entry.name, entry.dtype, shard, *in_box(changes, shard.box, entry.shape))

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.places.nbytes + self.values.nbytes

    def on(self, base: Tensor) -> Tensor:
        """The piece's new weights: a contiguous tensor on the device of the live weights."""
        new = base.detach().to(self.shard.view.device).clone(memory_format=torch.contiguous_format)
        words_of(new).reshape(-1)[self.places.to(new.device)] = self.values.to(new.device)
        return new

    def write(self, base: Tensor) -> None:
        """Write the new weights to the live storage."""
        with writes():
            self.shard.view.copy_(self.on(base))
        self.shard.publish()


@allocates()
def exact_pieces(
    file: DeltaFile, placement: Placement, *, base_of: Callable[[ShardView], Tensor], group: object
) -> tuple[ExactPiece, ...]:
    """Decode and check every sharded exact tensor of a file. Collective: all ranks call it, and all raise the error.

    placement: whose weights have been checked to be the base's. base_of: the base's weights of a shard. Raises PxdError
    (a damaged file, E405), LiveModelError.
    """
    ranks, failure = Ranks(group), KeptError()
    entries = [entry for entry in file.manifest.modules if entry.encoding is Encoding.EXACT]
    boxes = ranks.all_gather({entry.name: placement[entry.name][0].box for entry in entries})
    with together(group):
        layouts = {entry.name: Layout.of(entry.shape, [each[entry.name] for each in boxes]) for entry in entries}
    pieces: list[ExactPiece] = []
    for turn, entry in enumerate(entries):
        if all(each[entry.name] == whole(entry.shape) for each in boxes):
            continue
        layout, owner = layouts[entry.name], turn % ranks.count
        base = first = placement[entry.name][0]
        with failure:
            base = ShardView(first.box, base_of(first))
        changes = ranks.broadcast(sharded_changes(ranks, owner, file, entry, layout, base, failure), rank=owner)
        with failure:
            placed = (shard for shard in placement[entry.name] if shard.box != whole(entry.shape))
            pieces += [ExactPiece.cut(entry, shard, changes) for shard in placed]
    with located(file.path):
        agree(failure.error, ranks.group)
    return tuple(piece for piece in pieces if len(piece.places))


def sharded_changes(
    ranks: Ranks,
    owner: int,
    file: DeltaFile,
    entry: ModuleEntry,
    layout: Layout,
    shard: ShardView,
    failure: KeptError,
) -> Changes:
    """Decode and check a tensor on its owner. Returns the changes there; nothing on the other ranks, or on an error.

    Collective. shard: this rank's piece. For other encodings only the digest of the base is checked.
    """
    module: ModuleDelta | None = None
    with failure:
        module = file.load(entry.name) if ranks.rank == owner and entry.encoding is Encoding.EXACT else None
    digest = hashlib.sha256()
    changes: list[tuple[NDArray[np.int64], Array]] = []
    for flat, weights in assembled(ranks, owner, layout, shard, entry.dtype, failure):
        if weights is None or failure.error is not None:
            continue
        with failure:
            if module is not None:
                changes.append(_moved(module, weights, flat))
            digest.update(raw_bytes(weights))
    if ranks.rank != owner or failure.error is not None:
        return []
    with failure:
        _check(entry, digest.hexdigest())
    return changes


def in_box(changes: Changes, box: Box, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The changes within a box: int64 places in it, and words."""
    found = [(*boxed_indices(places, box, shape), words) for places, words in changes]
    places = [local for _, local, _ in found]
    values = [words[inside] for inside, _, words in found]
    return (
        torch.from_numpy(np.concatenate(places) if places else np.empty(0, np.int64)),
        torch.from_numpy(np.concatenate(values) if values else np.empty(0, np.int16)),
    )


def words_of(tensor: Tensor) -> Tensor:
    """A tensor's patterns, as integers that share its memory."""
    return tensor.detach().view(_WORDS[tensor.element_size()])


def _moved(module: ModuleDelta, weights: Array, flat: slice) -> tuple[NDArray[np.int64], Array]:
    """Update a range of weights in place. Returns the places that change in the flat tensor, and their words."""
    words = weights.reshape(-1).view(f"i{weights.dtype.itemsize}")
    before = words.copy()
    if module.index is not None and module.data is not None:
        first, last = flat.start // BLOCK, -(-flat.stop // BLOCK)
        begin, end = (int((module.index[:to] >> np.uint32(8)).sum(dtype=np.int64)) for to in (first, last))
        index, data = module.index[first:last], module.data[begin:end]
        apply(weights, index, data, module.dtype, field=module.name, first=first)
    places = np.flatnonzero(before != words)
    return places + flat.start, words[places]


def _check(entry: ModuleEntry, digest: str) -> None:
    if entry.encoding is Encoding.EXACT and digest != entry.result:
        fail("E405", field=entry.name)  # SPEC 7.4
    if entry.encoding is not Encoding.EXACT and entry.base is not None and digest != entry.base.sha256:
        fail("E404", field=entry.name)  # SPEC 7.3
