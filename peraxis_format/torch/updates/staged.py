"""An exact update that is checked but not yet written, on one rank or on all ranks of a model.

    staged = stage(file, placement)         checks payload, decoding and digests on the live weights; writes none
    staged.write()                          writes the changes; an error on one rank restores the weights of all

For each tensor the places that change and their new patterns are kept, or the whole tensor if that is smaller. A
sharded tensor is checked by one rank, which differs each time: it assembles a range of the tensor, decodes and hashes
it, and after the last one sends the changes to all, which keep those of their pieces. So a rank holds its pieces, an
update's bytes, its changes, those of one tensor, and one range; for an anchor one tensor and a copy of its pieces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
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
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.place.binding import agree
from peraxis_format.torch.place.shards import Placement, ShardView, increment_versions, whole
from peraxis_format.torch.updates.pieces import Layout, Ranks, assembled, boxed_indices, slices
from peraxis_format.torch.updates.proof import proven, refuse_others

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

    def exchange(self) -> None:
        """Exchange values and live weights, so that a second call restores both."""
        flat = _words(self.part.view).reshape(-1)
        if self.places is None:
            old = flat.clone()
            flat.copy_(self.values)
        else:
            old = flat[self.places]
            flat[self.places] = self.values
        self.values.copy_(old)
        self.part.publish()


@dataclass(frozen=True, slots=True, eq=False)
class StagedUpdate:
    """A checked update. content_id: that of its file. nbytes: its memory on this rank."""

    content_id: str
    nbytes: int
    _changes: tuple[_Change, ...]
    _group: Any

    @torch.no_grad()
    def write(self) -> None:
        """Write the new weights on all ranks of the group, or restore the old ones on all. Collective.

        The old weights must still be those of `stage`, and no forward may run. Raises the error of any rank.
        """
        written: list[_Change] = []
        failure: Exception | None = None
        try:
            for change in self._changes:
                change.exchange()
                written.append(change)
        except Exception as error:
            failure = error
        try:
            agree(failure, self._group)
        except BaseException:
            for change in reversed(written):
                change.exchange()
            raise
        increment_versions(change.part for change in self._changes)


class _FirstError:
    """A context that keeps the first error of this rank, which goes on because others wait for its pieces."""

    error: Exception | None = None

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        if isinstance(error, Exception):
            self.error = self.error or error
        return error is None or isinstance(error, Exception)


@torch.no_grad()
def stage(file: DeltaFile, placement: Placement, *, group: Any = None) -> StagedUpdate:
    """Check an exact update, or an anchor, against live weights, on all ranks of a group or on none. Collective.

    placement: that of `place(..., exact=True)`; tensors may be sharded over `group` (default: all ranks). Raises
    PxdError if the file is damaged or the weights are in another state (E404, E405), LiveModelError if they cannot take
    it, on all ranks. Nothing is written then.
    """
    ranks, failure = Ranks(group), _FirstError()
    with failure:
        refuse_others(file, placement)
    agree(failure.error, group)
    layouts = _layouts(ranks, file, placement)
    changes: list[_Change] = []
    for turn, entry in enumerate(file.manifest.modules):
        parts = placement[entry.name]
        if entry.name in layouts:
            layout, owner = layouts[entry.name], turn % ranks.count
            found = ranks.said_by(_proven(ranks, owner, file, entry, layout, parts, failure), rank=owner)
            with failure:
                changes += _cut(found, layout, parts)
                changes += _replaced(file.load(entry.name), parts) if entry.encoding is Encoding.FULL else ()
        else:
            with failure:
                changes += _whole_changes(entry, file.load(entry.name), parts)
    agree(failure.error, group)
    return StagedUpdate(file.content_id, sum(change.nbytes for change in changes), tuple(changes), group)


def _layouts(ranks: Ranks, file: DeltaFile, placement: Placement) -> dict[str, Layout]:
    """The layouts of sharded tensors. Raises LiveModelError, on all ranks."""
    entries = file.manifest.modules
    boxes = ranks.gathered({entry.name: [part.box for part in placement[entry.name]] for entry in entries})
    if len(set(ranks.gathered(file.content_id))) > 1:
        raise LiveModelError(f"{file.path}: the ranks have different files")
    layouts: dict[str, Layout] = {}
    for entry in entries:
        if all(box == whole(entry.shape) for found in boxes for box in found[entry.name]):
            continue
        if any(box != found[entry.name][0] for found in boxes for box in found[entry.name]):
            raise LiveModelError(f"{entry.name}: its aliases are sharded in other ways; tie them, or untie the model")
        layout = layouts[entry.name] = Layout.of(entry.shape, [found[entry.name][0] for found in boxes])
        wanted = int(np.prod(entry.shape, dtype=np.int64))
        if layout.covered != wanted:
            raise LiveModelError(
                f"{entry.name}: the ranks have {layout.covered} of its {wanted} weights; check `shards`, and that "
                "torch.distributed is initialised"
            )
    return layouts


# --- tensors that are whole on every rank ----------------------------------------------------------------


def _whole_changes(entry: ModuleEntry, module: ModuleDelta, parts: Sequence[ShardView]) -> Iterator[_Change]:
    """Every rank checks its tensor."""
    for part in parts:
        places: list[Tensor] = []
        values: list[Tensor] = []
        begin = 0
        for live, new in proven(entry, part.view, module):
            before, after = _words(live), _words(new)
            changed = (before != after).nonzero().reshape(-1)
            places.append(changed + begin)
            values.append(after[changed])
            begin += len(live)
        if places:
            yield _smaller(part, torch.cat(places), torch.cat(values))
    yield from _replaced(module, parts)


# --- sharded tensors -------------------------------------------------------------------------------------


def _proven(
    ranks: Ranks,
    owner: int,
    file: DeltaFile,
    entry: ModuleEntry,
    layout: Layout,
    parts: Sequence[ShardView],
    failure: _FirstError,
) -> list[tuple[NDArray[np.int64], Array]]:
    """Check the tensor on its owner. Returns the places that change there, and their words; nothing elsewhere."""
    if entry.encoding is not Encoding.EXACT and entry.base is None:
        return []
    module: ModuleDelta | None = None
    with failure:
        if any(not _words(part.view).equal(_words(parts[0].view)) for part in parts[1:]):
            fail("E404", "its aliases have other weights", field=entry.name)
        module = file.load(entry.name) if ranks.rank == owner and entry.encoding is Encoding.EXACT else None
    digest = hashlib.sha256()
    changes: list[tuple[NDArray[np.int64], Array]] = []
    for flat, weights in assembled(ranks, owner, layout, parts[0], entry.dtype):
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


def _moved(module: ModuleDelta, weights: Array, flat: slice) -> tuple[NDArray[np.int64], Array]:
    """Update a range of weights in place. Returns the places that change in the flat tensor, and their words."""
    before = _array_words(weights).copy()
    if module.index is not None and module.data is not None:
        first, last = flat.start // BLOCK, -(-flat.stop // BLOCK)
        begin, end = (int((module.index[:to] >> np.uint32(8)).sum(dtype=np.int64)) for to in (first, last))
        apply(weights, module.index[first:last], module.data[begin:end], module.dtype)
    after = _array_words(weights)
    places = np.flatnonzero(before != after)
    return places + flat.start, after[places]


def _check(entry: ModuleEntry, digest: str) -> None:
    if entry.encoding is Encoding.EXACT and digest != entry.result:
        fail("E405", field=entry.name)  # SPEC 7.4
    if entry.encoding is not Encoding.EXACT and entry.base is not None and digest != entry.base.sha256:
        fail("E404", field=entry.name)  # SPEC 7.3


def _cut(
    changes: Sequence[tuple[NDArray[np.int64], Array]], layout: Layout, parts: Sequence[ShardView]
) -> Iterator[_Change]:
    """The changes of a whole tensor within this rank's piece."""
    found = [(*boxed_indices(places, parts[0].box, layout.shape), words) for places, words in changes]
    if any(local.size for _, local, _ in found):
        places = torch.from_numpy(np.concatenate([local for _, local, _ in found]))
        values = torch.from_numpy(np.concatenate([words[inside] for inside, _, words in found]))
        yield from (_smaller(part, places, values.clone()) for part in parts)


# --- storage of changes ----------------------------------------------------------------------------------


def _replaced(module: ModuleDelta, parts: Sequence[ShardView]) -> Iterator[_Change]:
    """This rank's pieces of a `full` tensor, copied to their devices."""
    for part in parts if module.full is not None else ():
        words = _array_words(np.asarray(module.full)[slices(part.box)]).copy()
        yield _Change(part, None, torch.from_numpy(words).to(part.view.device))


def _words(tensor: Tensor) -> Tensor:
    return tensor.detach().view(_WORDS[tensor.element_size()])


def _array_words(array: Array) -> Array:
    """A storage array as flat words."""
    size = array.dtype.itemsize
    return np.ascontiguousarray(array).reshape(-1).view("u1" if size == 1 else f"i{size}")


def _smaller(part: ShardView, places: Tensor, values: Tensor) -> _Change:
    """The change as places and values, or as the whole tensor if that is smaller."""
    live = _words(part.view).reshape(-1)
    places, values = places.to(live.device), values.to(live.device)
    if len(places) * (_PLACE_BYTES + values.element_size()) < live.nbytes:
        return _Change(part, places, values)
    everything = live.clone()
    everything[places] = values
    return _Change(part, None, everything)
