"""An exact update that is checked but not yet written, on one rank or on all ranks of a model.

    staged = stage(file, placement)         checks payload, decoding and digests on the live weights; writes none
    staged.write()                          a scatter, without waiting or checks

For each tensor the places that change and their new patterns are kept, or the whole tensor if that is smaller. A
sharded tensor is assembled on one rank, which checks it and sends the changes to the others; then all ranks agree, so
that the update is written on all ranks or on none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peraxis_format.delta import Encoding, ModuleDelta
from peraxis_format.dtypes import Array, raw_bytes
from peraxis_format.errors import LiveModelError, PxdError, fail
from peraxis_format.manifest import ModuleEntry
from peraxis_format.ops.exact import apply
from peraxis_format.ops.tensors import storage_array
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.place.binding import agree, in_turns, sharded_anywhere
from peraxis_format.torch.place.claims import refuse_claimed
from peraxis_format.torch.place.shards import Box, Placement, ShardView, increment_versions, whole
from peraxis_format.torch.updates.proof import check_digest, stretches

__all__ = ["StagedUpdate", "stage"]

_WORDS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLACE_BYTES: Final = 8


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """The changes of one live storage. places: int64, of the flat tensor; None if values is the whole tensor."""

    part: ShardView
    places: Tensor | None
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.places is None else self.places.nbytes)

    def write(self) -> None:
        flat = _words(self.part.view).reshape(-1)
        if self.places is None:
            flat.copy_(self.values)
        else:
            flat[self.places] = self.values
        self.part.publish()


@dataclass(frozen=True, slots=True, eq=False)
class StagedUpdate:
    """A checked update. content_id: that of its file. nbytes: its memory on this rank."""

    content_id: str
    nbytes: int
    _changes: tuple[_Change, ...]

    @torch.no_grad()
    def write(self) -> None:
        """Write the new weights. The old ones must still be those of `stage`, and no forward may run."""
        for change in self._changes:
            change.write()
        increment_versions(change.part for change in self._changes)


@torch.no_grad()
def stage(file: DeltaFile, placement: Placement, *, group: Any = None) -> StagedUpdate:
    """Check an exact update, or an anchor, against live weights, on all ranks of a group or on none.

    placement: that of `place(..., exact=True)`; tensors may be sharded over `group` (default: all ranks). Raises
    PxdError if the file is damaged or the weights are in another state (E404, E405), LiveModelError if they cannot take
    it, on all ranks. Nothing is written then.
    """
    changes: list[_Change] = []
    failure: BaseException | None = None
    try:
        _refuse_others(file, placement)
        refuse_claimed(part.live for parts in placement.values() for part in parts)
    except Exception as error:
        failure = error
    pieces = [] if failure else [e for e in file.manifest.modules if _is_piece(e, placement)]
    sharded = sharded_anywhere(here=bool(pieces), group=group)
    if sharded:
        agree(failure, group)
    elif failure is not None:
        raise failure
    try:
        for entry in file.manifest.modules:
            if not _is_piece(entry, placement):
                changes += _whole_changes(file, entry, placement[entry.name])
    except Exception as error:
        failure = error
    if sharded:
        try:
            changes += _piece_changes(file, pieces, placement, group)
        except (PxdError, LiveModelError, OSError) as error:
            failure = failure or error
        agree(failure, group)
    elif pieces:
        raise LiveModelError(f"{pieces[0].name}: only a piece of it is on this rank; initialise torch.distributed")
    if failure is not None:
        raise failure
    return StagedUpdate(file.content_id, sum(change.nbytes for change in changes), tuple(changes))


def _refuse_others(file: DeltaFile, placement: Placement) -> None:
    for entry in file.manifest.modules:
        if entry.encoding is Encoding.SIGN or (entry.base is not None and entry.base.dtype is not entry.dtype):
            raise LiveModelError(f"{file.path}: {entry.name} is not an exact update; stage it as a variant")
        if not all(part.view.is_contiguous() for part in placement[entry.name]):
            raise LiveModelError(f"{entry.name}: is strided, which exact updates do not support")


def _is_piece(entry: ModuleEntry, placement: Placement) -> bool:
    return any(part.box != whole(entry.shape) for part in placement[entry.name])


# --- tensors that are whole on this rank -----------------------------------------------------------------


def _whole_changes(file: DeltaFile, entry: ModuleEntry, parts: Sequence[ShardView]) -> Iterator[_Change]:
    if entry.encoding is not Encoding.EXACT and entry.base is not None:
        for part in parts:
            check_digest(entry, part.view)
    if entry.encoding is Encoding.SAME:
        return
    module = file.load(entry.name)
    for part in parts:
        if module.full is not None:
            yield _Change(part, None, _on(part, module.full))
        else:
            yield _decoded(entry, module, part)


def _decoded(entry: ModuleEntry, module: ModuleDelta, part: ShardView) -> _Change:
    digest = hashlib.sha256()
    places: list[Tensor] = []
    values: list[Tensor] = []
    begin = 0
    for live, new in stretches(part.view, module):
        digest.update(raw_bytes(storage_array(new.cpu())))
        before, after = _words(live), _words(new)
        changed = (before != after).nonzero().reshape(-1)
        places.append(changed + begin)
        values.append(after[changed])
        begin += len(live)
    if digest.hexdigest() != entry.result:
        fail("E405", field=entry.name)  # SPEC 7.4
    return _smaller(part, torch.cat(places), torch.cat(values))


# --- sharded tensors -------------------------------------------------------------------------------------


def _piece_changes(file: DeltaFile, pieces: Sequence[ModuleEntry], placement: Placement, group: Any) -> list[_Change]:
    """Process all tensors in spite of failures, as the other ranks do. Raises the first failure at the end."""
    changes: list[_Change] = []
    failure: BaseException | None = None
    for entry, owner, old in in_turns(pieces, placement, group):
        told: list[Any] = [None]
        if old is not None:
            try:
                told = [_proven(file, entry, old)]
            except (PxdError, OSError) as error:
                failure = failure or error
        torch.distributed.broadcast_object_list(told, group=group, group_src=owner)
        if told[0] is not None:
            places, values = told[0]
            changes += [_local(part, entry, places, values) for part in placement[entry.name]]
    if failure is not None:
        raise failure
    return changes


def _proven(file: DeltaFile, entry: ModuleEntry, old: Array) -> tuple[NDArray[np.int64], Array] | None:
    """(places, words) that change in a whole tensor, None if nothing changes. Raises PxdError, OSError."""
    bound = None if entry.encoding is Encoding.EXACT or entry.base is None else entry.base.sha256
    if bound is not None and hashlib.sha256(raw_bytes(old)).hexdigest() != bound:
        fail("E404", field=entry.name)  # SPEC 7.3
    if entry.encoding is Encoding.SAME:
        return None
    module = file.load(entry.name)
    new = old.copy() if module.full is None else np.asarray(module.full)
    if module.full is None and module.index is not None and module.data is not None:
        apply(new, module.index, module.data, module.dtype, threads=1)
        if hashlib.sha256(raw_bytes(new)).hexdigest() != entry.result:
            fail("E405", field=entry.name)  # SPEC 7.4
    before, after = _array_words(old), _array_words(new)
    places = np.flatnonzero(before != after)
    return places, after[places]


def _local(part: ShardView, entry: ModuleEntry, places: NDArray[np.int64], values: Array) -> _Change:
    """The changes of a whole tensor within a part."""
    inside, at = _within(part.box, entry.shape, places)
    return _smaller(part, torch.from_numpy(at), torch.from_numpy(np.ascontiguousarray(values[inside])))


def _within(box: Box, shape: Sequence[int], places: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """A mask of the places of a flat tensor that are in a box, and their places in the flat box."""
    index = np.unravel_index(places, tuple(shape))
    inside = np.ones(places.size, np.bool_)
    for axis, (begin, end) in zip(index, box, strict=True):
        inside &= (axis >= begin) & (axis < end)
    own = tuple(axis[inside] - begin for axis, (begin, _) in zip(index, box, strict=True))
    at = np.ravel_multi_index(own, tuple(end - begin for begin, end in box))
    return inside, np.asarray(at, np.int64)


# --- storage of changes ----------------------------------------------------------------------------------


def _words(tensor: Tensor) -> Tensor:
    return tensor.detach().view(_WORDS[tensor.element_size()])


def _array_words(array: Array) -> Array:
    """A storage array as flat words."""
    return (
        np.ascontiguousarray(array).reshape(-1).view("u1" if array.dtype.itemsize == 1 else f"i{array.dtype.itemsize}")
    )


def _on(part: ShardView, array: Array) -> Tensor:
    """A copy of a whole storage array as flat words on the part's device."""
    return torch.from_numpy(_array_words(array).copy()).to(part.view.device)


def _smaller(part: ShardView, places: Tensor, values: Tensor) -> _Change:
    """The change as places and values, or as the whole tensor if that is smaller."""
    live = _words(part.view).reshape(-1)
    places, values = places.to(live.device), values.to(live.device)
    if len(places) * (_PLACE_BYTES + values.element_size()) < live.nbytes:
        return _Change(part, places, values)
    everything = live.clone()
    everything[places] = values
    return _Change(part, None, everything)
