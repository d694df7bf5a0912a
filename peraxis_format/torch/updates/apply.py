"""apply_update: apply one exact update to a live model, atomically.

An update is checked before a weight is written: payload digests, decoding, and the digest of each updated tensor, which
also shows that the tensor is in the state that the update was made on. Then it is written, under the caller's lock. So
an update is applied whole or not at all, never twice and never out of order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from peraxis_format.delta import Encoding, ModuleDelta
from peraxis_format.errors import located
from peraxis_format.interrupts import uninterrupted
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.modes import allocates
from peraxis_format.torch.place.claims import writing
from peraxis_format.torch.place.pieces import in_pieces
from peraxis_format.torch.place.placement import place
from peraxis_format.torch.place.proof import proven
from peraxis_format.torch.place.ranks import together
from peraxis_format.torch.place.remedies import FOR_UPDATES
from peraxis_format.torch.place.shards import Placement, Shard, Target, increment_versions
from peraxis_format.torch.updates.errors import advised, refuse_others
from peraxis_format.torch.updates.staged import stage
from peraxis_format.torch.updates.write import write_whole

__all__ = ["apply_update"]


@allocates()
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
    cannot take the update, or if another thread is writing it. The model is then unchanged. An error while weights are
    written does not leave half of them: the rest is written too. Ctrl-C waits for the end of the writes.
    """
    pieces = in_pieces(target, shards)
    with contextlib.ExitStack() as stack:
        with together(group, sharded=pieces):
            file = update if isinstance(update, DeltaFile) else stack.enter_context(DeltaFile(update))
            stack.enter_context(advised(file.manifest.previous, base=file.manifest.base.id))
            placement = place(target, file.manifest, shards=shards, remedies=FOR_UPDATES)
            owner = stack.enter_context(writing(shard.live for placed in placement.values() for shard in placed))
        if pieces:
            staged = stage(file, placement, group=group, owner=owner)
            with together(group):
                stack.enter_context(lock or contextlib.nullcontext())
            staged.write()
            return
        refuse_others(file, placement)
        with located(file.path):
            modules = list(_proven(file, placement))
        with lock or contextlib.nullcontext(), uninterrupted():
            try:
                write_whole(file, modules, placement)
            finally:
                increment_versions(shard for placed in placement.values() for shard in placed)


# A model that is whole needs no staged changes: decoding again at the write costs little, and cannot fail after the
# check. So the memory is that of the update's bytes and one range of weights, not of every change (an index of 8 bytes
# and a value each). An anchor is held whole.


def _proven(file: DeltaFile, placement: Placement) -> Iterator[ModuleDelta]:
    """Yield the modules to write, read once, after the digests of their old and new tensors are checked."""
    for entry in file.manifest.modules:
        module = file.load(entry.name)
        for shard in placement[entry.name]:
            for _ in proven(entry, shard.view, module):
                pass
        if entry.encoding is not Encoding.SAME:
            yield module
