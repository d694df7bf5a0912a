"""Apply one update to a sharded model: ranks check it in turn, and all of them write it or none.

The owner of a tensor assembles its old weights, one range at a time, decodes, hashes, and keeps the changes. When all
checks have passed on every rank, changes are sent to the ranks with their boxes, which write them. So a rank holds its
pieces, an update's bytes, its changes and one range; for an anchor also one tensor, and a copy of its pieces.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peraxis_format.delta import Encoding, ModuleDelta
from peraxis_format.dtypes import Array, raw_bytes
from peraxis_format.errors import LiveModelError, fail
from peraxis_format.manifest import ModuleEntry
from peraxis_format.ops.exact import BLOCK, apply
from peraxis_format.ops.tensors import from_storage
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.place.binding import agree
from peraxis_format.torch.place.shards import Placement, ShardView
from peraxis_format.torch.updates.pieces import (
    Layout,
    Ranks,
    boxed_indices,
    exchanged,
    row_stretches,
    rows_on,
    slices,
)

__all__ = ["apply_sharded", "sharded_digest"]

_STRETCH: Final = 16 * BLOCK  # weights to decode at a time
_WORDS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class _Changes:
    """The changes of one tensor: flat indices, ascending, and the new patterns as unsigned words."""

    name: str
    index: NDArray[np.int64]
    words: Array


class _Failure:
    """The first error of this rank. Ranks continue through the whole file, because the others wait for their pieces."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def run(self, job: Callable[[], None]) -> None:
        """Run a part of the work, unless there is an error already."""
        if self.error is None:
            try:
                job()
            except Exception as error:
                self.error = error


def apply_sharded(
    file: DeltaFile, placement: Placement, *, lock: AbstractContextManager[Any] | None, group: Any
) -> None:
    """Apply an exact update or an anchor on every rank, or on none. Collective.

    Raises PxdError (a damaged file, another state) or LiveModelError, on all ranks.
    """
    ranks = Ranks(group)
    layouts = _layouts(ranks, file, placement)
    failure = _Failure()
    changes: list[_Changes] = []
    whole: list[tuple[ShardView, Tensor]] = []
    for turn, entry in enumerate(file.manifest.modules):
        owner, part = turn % ranks.count, placement[entry.name][0]
        _prove(ranks, owner, file, entry, layouts[entry.name], part, failure, changes)
        if entry.encoding is Encoding.FULL:
            failure.run(lambda name=entry.name: whole.extend(_pieces(file.load(name), placement[name])))  # type: ignore[misc]
    agree(failure.error, group)
    boxes = ranks.gathered({name: parts[0].box for name, parts in placement.items()})
    outgoing = [[_within(item, box[item.name], layouts[item.name]) for item in changes] for box in boxes]
    incoming = [item for items in exchanged(ranks, outgoing) for item in items if item.index.size]
    _write(incoming, whole, placement, lock=lock, group=group)


def _layouts(ranks: Ranks, file: DeltaFile, placement: Placement) -> dict[str, Layout]:
    error: Exception | None = None
    for entry in file.manifest.modules:
        parts = placement[entry.name]
        if any(part.box != parts[0].box for part in parts):
            error = LiveModelError(f"{entry.name}: its aliases are sharded in other ways; tie them, or untie the model")
        if not all(part.view.is_contiguous() for part in parts):
            error = LiveModelError(f"{entry.name}: is strided, which exact updates do not support")
    agree(error, ranks.group)
    boxes = ranks.gathered({entry.name: placement[entry.name][0].box for entry in file.manifest.modules})
    layouts = {e.name: Layout.of(e.shape, [box[e.name] for box in boxes]) for e in file.manifest.modules}
    for entry in file.manifest.modules:
        covered, wanted = layouts[entry.name].covered, int(np.prod(entry.shape, dtype=np.int64))
        if covered != wanted:
            raise LiveModelError(f"{entry.name}: the ranks have {covered} of its {wanted} weights; check `shards`")
    return layouts


def _prove(
    ranks: Ranks,
    owner: int,
    file: DeltaFile,
    entry: ModuleEntry,
    layout: Layout,
    part: ShardView,
    failure: _Failure,
    changes: list[_Changes],
) -> None:
    """Check the digests of a tensor before and after the update; its owner keeps the changes."""
    if entry.encoding is not Encoding.EXACT and entry.base is None:
        return
    mine = owner == ranks.rank
    loaded: list[ModuleDelta] = []
    if mine and entry.encoding is Encoding.EXACT:
        failure.run(lambda: loaded.append(file.load(entry.name)))
    digest = hashlib.sha256()
    found: list[_Changes] = []
    for flat, rows in row_stretches(layout, _STRETCH):
        old = rows_on(ranks, owner, layout, rows, mine=part.view, box=part.box, dtype=entry.dtype)
        if old is not None and failure.error is None:
            first = rows.start * layout.row
            stretch = old.reshape(-1)[flat.start - first : flat.stop - first] if layout.shape else old.reshape(-1)
            failure.run(lambda s=stretch, f=flat: found.append(_moved(entry, loaded, s, f)))  # type: ignore[misc]
            digest.update(raw_bytes(stretch))
    if not mine or failure.error is not None:
        return
    changes.extend(item for item in found if item.index.size)
    failure.run(lambda: _check(entry, digest.hexdigest()))


def _moved(entry: ModuleEntry, loaded: list[ModuleDelta], stretch: Array, flat: slice) -> _Changes:
    """Update a range of weights in place. Returns the changes."""
    before = stretch.view(f"<u{stretch.dtype.itemsize}").copy()
    if loaded and loaded[0].index is not None and loaded[0].data is not None:
        index = loaded[0].index
        first, last = flat.start // BLOCK, -(-flat.stop // BLOCK)
        begin = int((index[:first] >> np.uint32(8)).sum(dtype=np.int64))
        end = begin + int((index[first:last] >> np.uint32(8)).sum(dtype=np.int64))
        apply(stretch, index[first:last], loaded[0].data[begin:end], entry.dtype)
    after = stretch.view(before.dtype)
    moved = np.flatnonzero(before != after).astype(np.int64)
    return _Changes(entry.name, moved + flat.start, after[moved])


def _check(entry: ModuleEntry, digest: str) -> None:
    if entry.encoding is Encoding.EXACT and digest != entry.result:
        fail("E405", field=entry.name)  # SPEC 7.4
    if entry.encoding is not Encoding.EXACT and entry.base is not None and digest != entry.base.sha256:
        fail("E404", field=entry.name)  # SPEC 7.3


def _pieces(module: ModuleDelta, parts: tuple[ShardView, ...]) -> list[tuple[ShardView, Tensor]]:
    """This rank's pieces of a `full` tensor."""
    if module.full is None:
        return []
    full = module.full
    return [(part, from_storage(np.array(full[slices(part.box)]), module.dtype)) for part in parts]


def _within(item: _Changes, box: Any, layout: Layout) -> _Changes:
    inside, local = boxed_indices(item.index, box, layout.shape)
    return _Changes(item.name, local, item.words[inside])


def _write(
    changes: list[_Changes],
    whole: list[tuple[ShardView, Tensor]],
    placement: Placement,
    *,
    lock: AbstractContextManager[Any] | None,
    group: Any,
) -> None:
    """Write on every rank, or restore the old weights on every rank."""
    undo: list[Callable[[], object]] = []
    failure: Exception | None = None
    with lock or contextlib.nullcontext(), torch.no_grad():
        try:
            for item in changes:
                for part in placement[item.name]:
                    _put(part, item, undo)
            for part, new in whole:
                old = part.view.detach().clone()
                undo.append(lambda view=part.view, old=old: view.copy_(old))  # type: ignore[misc]
                part.view.copy_(new)
        except Exception as error:
            failure = error
        try:
            agree(failure, group)
        except BaseException:
            for job in reversed(undo):
                job()
            raise
        finally:
            for parts in placement.values():
                for part in parts:
                    part.publish()


def _put(part: ShardView, item: _Changes, undo: list[Callable[[], object]]) -> None:
    live = part.view.detach().reshape(-1).view(_WORDS[item.words.dtype.itemsize])
    index = torch.from_numpy(item.index).to(live.device)
    words = item.words.view(np.uint8 if item.words.dtype.itemsize == 1 else f"<i{item.words.dtype.itemsize}")
    values = torch.from_numpy(words.copy()).to(live.device)
    old = live[index]
    undo.append(lambda: live.index_copy_(0, index, old))
    live.index_copy_(0, index, values)


def sharded_digest(entry: ModuleEntry, part: ShardView, turn: int, group: Any) -> str:
    """The hex digest of a sharded live tensor, on every rank. Collective."""
    ranks = Ranks(group)
    layout = Layout.of(entry.shape, ranks.gathered(part.box))
    owner = turn % ranks.count
    digest = hashlib.sha256()
    for flat, rows in row_stretches(layout, _STRETCH):
        old = rows_on(ranks, owner, layout, rows, mine=part.view, box=part.box, dtype=entry.dtype)
        if old is not None:
            first = rows.start * layout.row
            digest.update(raw_bytes(old.reshape(-1)[flat.start - first : flat.stop - first] if layout.shape else old))
    found: str = ranks.said_by(digest.hexdigest(), rank=owner)
    return found
