"""An exact update that is checked but not yet written, on one rank or on all ranks of a model.

    staged = stage(file, placement)         checks payload, decoding and digests on the live weights; writes none
    staged.write()                          writes the changes; an error on one rank restores the weights of all

For each tensor the places that change and their new patterns are kept, or the whole tensor if that is smaller. A
sharded tensor is checked by one rank, which differs each time: it assembles a range of the tensor, decodes and hashes
it, and after the last one sends the changes to all, which keep those of their pieces. So a rank holds its pieces, an
update's bytes, its changes, those of one tensor, and one range; for an anchor one tensor and a copy of its pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from peraxis_format.delta import Encoding, ModuleDelta
from peraxis_format.dtypes import Array
from peraxis_format.errors import LiveModelError, fail, located, torn
from peraxis_format.interrupts import uninterrupted
from peraxis_format.manifest import ModuleEntry
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.modes import allocates, writes
from peraxis_format.torch.place.claims import refuse_claimed
from peraxis_format.torch.place.pieces import Layout
from peraxis_format.torch.place.proof import proven
from peraxis_format.torch.place.ranks import KeptError, Ranks, agree, together
from peraxis_format.torch.place.replicas import check_replicas
from peraxis_format.torch.place.sharded_exact import Changes, in_box, sharded_changes, words_of
from peraxis_format.torch.place.shards import Box, Placement, ShardView, increment_versions, slices, whole
from peraxis_format.torch.updates.errors import refuse_others

__all__ = ["StagedUpdate", "stage"]

_PLACE_BYTES: Final = 8


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """The changes of one live storage. places: int64, of the flat tensor; None if values is the whole tensor."""

    shard: ShardView
    places: Tensor | None
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.places is None else self.places.nbytes)

    @writes()
    def exchange(self) -> None:
        """Exchange values and live weights, so that a second call restores both. On an error both are unchanged."""
        flat = words_of(self.shard.view).reshape(-1)
        places = slice(None) if self.places is None else self.places
        old, new = flat[places].clone(), self.values.clone()
        try:
            flat[places] = new
            self.values.copy_(old)
            self.shard.publish()
        except BaseException as error:
            try:
                flat[places] = old
                self.values.copy_(new)
                self.shard.publish()
            except BaseException as again:
                raise torn("an update", error, again) from again
            raise


@dataclass(frozen=True, slots=True, eq=False)
class StagedUpdate:
    """A checked update. content_id: that of its file. nbytes: its memory on this rank."""

    content_id: str
    nbytes: int
    _changes: tuple[_Change, ...]
    _group: Any

    @allocates()
    def write(self) -> None:
        """Write the new weights on all ranks of the group, or restore the old ones on all. Collective.

        The old weights must still be those of `stage`, and no forward may run. Ctrl-C waits for the end. Raises the
        error of any rank, and TornError where the old weights could not be restored.
        """
        with uninterrupted():
            written: list[_Change] = []
            try:
                with together(self._group):
                    for change in self._changes:
                        change.exchange()
                        written.append(change)
            except BaseException as error:
                with together(self._group):
                    self._revert(written, error)
                raise
            finally:
                increment_versions(change.shard for change in self._changes)

    def _revert(self, written: list[_Change], error: BaseException) -> None:
        """Restore the old weights. Raises TornError if a change cannot be reverted; the others are."""
        failure: BaseException | None = None
        for change in reversed(written):
            try:
                change.exchange()
            except BaseException as again:
                failure = again
        if failure is not None:
            raise torn("an update", error, failure) from failure


@allocates()
def stage(file: DeltaFile, placement: Placement, *, group: Any = None, owner: object = None) -> StagedUpdate:
    """Check an exact update, or an anchor, against live weights, on all ranks of a group or on none. Collective.

    placement: that of `place`; tensors may be sharded over `group` (default: all ranks). owner: that of the caller's
    claims on the weights (claims.py). Raises PxdError if the file is damaged or the weights are in another state (E404,
    E405), LiveModelError if they cannot take it, on all ranks. Nothing is written then.
    """
    ranks, failure = Ranks(group), KeptError()
    with failure:
        refuse_others(file, placement)
        refuse_claimed((shard.live for placed in placement.values() for shard in placed), owner)
    agree(failure.error, group)
    layouts = _layouts(ranks, file, placement)
    _check_replicas(ranks, file, placement, layouts)
    changes: list[_Change] = []
    for turn, entry in enumerate(file.manifest.modules):
        placed = placement[entry.name]
        if entry.name in layouts:
            layout, checker = layouts[entry.name], turn % ranks.count
            found = ranks.broadcast(_proven(ranks, checker, file, entry, layout, placed, failure), rank=checker)
            with failure:
                changes += _cut(found, layout, placed)
                changes += _replaced(file.load(entry.name), placed) if entry.encoding is Encoding.FULL else ()
        else:
            with failure:
                changes += _whole_changes(entry, file.load(entry.name), placed)
    with located(file.path):
        agree(failure.error, group)
    return StagedUpdate(file.content_id, sum(change.nbytes for change in changes), tuple(changes), group)


def _layouts(ranks: Ranks, file: DeltaFile, placement: Placement) -> dict[str, Layout]:
    """The layouts of sharded tensors. Raises LiveModelError, on all ranks."""
    entries = file.manifest.modules
    boxes = ranks.all_gather({entry.name: [shard.box for shard in placement[entry.name]] for entry in entries})
    if len(set(ranks.all_gather(file.content_id))) > 1:
        raise LiveModelError(f"{file.path}: the ranks have different files; give all of them one folder")
    with together(ranks.group):
        return dict(_pieces(entries, boxes))


def _pieces(
    entries: Sequence[ModuleEntry], boxes: Sequence[Mapping[str, Sequence[Box]]]
) -> Iterator[tuple[str, Layout]]:
    """The layouts of tensors that some rank has only a piece of. boxes: those of every rank, for each alias."""
    for entry in entries:
        if all(box == whole(entry.shape) for found in boxes for box in found[entry.name]):
            continue
        if any(box != found[entry.name][0] for found in boxes for box in found[entry.name]):
            raise LiveModelError(f"{entry.name}: its aliases are sharded in other ways; tie them, or untie the model")
        layout = Layout.of(entry.shape, [found[entry.name][0] for found in boxes])
        layout.check_complete(entry.name, "check `shards`, and that torch.distributed is initialised")
        yield entry.name, layout


def _check_replicas(ranks: Ranks, file: DeltaFile, placement: Placement, layouts: Mapping[str, Layout]) -> None:
    """Check that all copies of a piece are the same, for tensors that have a base. Raises BindingError on all ranks."""
    bound = (entry.name for entry in file.manifest.modules if entry.base is not None and entry.name in layouts)
    placed = {name: placement[name][0] for name in bound}
    boxes = ranks.all_gather({name: shard.box for name, shard in placed.items()})
    with located(file.path):
        check_replicas(placed, boxes, ranks.all_gather)


# --- tensors that are whole on every rank ----------------------------------------------------------------


def _whole_changes(entry: ModuleEntry, module: ModuleDelta, placed: Sequence[ShardView]) -> Iterator[_Change]:
    """Every rank checks its tensor."""
    for shard in placed:
        places: list[Tensor] = []
        values: list[Tensor] = []
        begin = 0
        for live, new in proven(entry, shard.view, module):
            before, after = words_of(live), words_of(new)
            changed = (before != after).nonzero().reshape(-1)
            places.append(changed + begin)
            values.append(after[changed])
            begin += len(live)
        if places:
            yield _smaller(shard, torch.cat(places), torch.cat(values))
    yield from _replaced(module, placed)


# --- sharded tensors -------------------------------------------------------------------------------------


def _proven(
    ranks: Ranks,
    owner: int,
    file: DeltaFile,
    entry: ModuleEntry,
    layout: Layout,
    placed: Sequence[ShardView],
    failure: KeptError,
) -> Changes:
    """Check the tensor on its owner. Returns the changes there; nothing elsewhere."""
    if entry.encoding is not Encoding.EXACT and entry.base is None:
        return []
    with failure:
        if any(not words_of(shard.view).equal(words_of(placed[0].view)) for shard in placed[1:]):
            fail("E404", "its aliases have other weights", field=entry.name)
    return sharded_changes(ranks, owner, file, entry, layout, placed[0], failure)


def _cut(changes: Changes, layout: Layout, placed: Sequence[ShardView]) -> Iterator[_Change]:
    """The changes of a whole tensor within this rank's piece."""
    places, values = in_box(changes, placed[0].box, layout.shape)
    if len(places):
        yield from (_smaller(shard, places, values.clone()) for shard in placed)


# --- storage of changes ----------------------------------------------------------------------------------


def _replaced(module: ModuleDelta, placed: Sequence[ShardView]) -> Iterator[_Change]:
    """This rank's pieces of a `full` tensor, copied to their devices."""
    for shard in placed if module.full is not None else ():
        words = _array_words(np.asarray(module.full)[slices(shard.box)]).copy()
        yield _Change(shard, None, torch.from_numpy(words).to(shard.view.device))


def _array_words(array: Array) -> Array:
    """A storage array as flat words."""
    size = array.dtype.itemsize
    return np.ascontiguousarray(array).reshape(-1).view("u1" if size == 1 else f"i{size}")


def _smaller(shard: ShardView, places: Tensor, values: Tensor) -> _Change:
    """The change as places and values, or as the whole tensor if that is smaller."""
    live = words_of(shard.view).reshape(-1)
    places, values = places.to(live.device), values.to(live.device)
    if len(places) * (_PLACE_BYTES + values.element_size()) < live.nbytes:
        return _Change(shard, places, values)
    everything = live.clone()
    everything[places] = values
    return _Change(shard, None, everything)
