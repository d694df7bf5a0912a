"""ShardedUpdateWriter: UpdateWriter for a sharded model, which is not assembled on any rank.

Each tensor has an owner, the rank that encodes it. The owner keeps the published tensor; every rank also keeps its own
published pieces. At a step each rank compares its pieces and sends changes, indices and values, to the owners; they
encode and hash, and rank 0 writes the file. So a rank holds twice its share of the model in host memory, and the
traffic is O(changes). Only the first state is sent whole, once, tensor by tensor; anchors are sent whole to rank 0.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from torch import Tensor, nn

from peraxis_format.chain_names import anchor_name, step_name
from peraxis_format.delta import BaseRef, Encoding, ModuleDelta
from peraxis_format.dtypes import Array, DType, digest_of
from peraxis_format.errors import LiveModelError
from peraxis_format.exact import lossless_module
from peraxis_format.torch.place.finder import local_shard
from peraxis_format.torch.place.pieces import Layout, flat_indices
from peraxis_format.torch.place.ranks import KeptError, Ranks, agree, together
from peraxis_format.torch.place.shards import Box, slices, whole
from peraxis_format.torch.updates.listing import UpdateFile
from peraxis_format.torch.updates.live import live_tensors, published_array, published_dtype
from peraxis_format.torch.updates.mirror import Mirror
from peraxis_format.torch.updates.owned import check_ranks, owned_state
from peraxis_format.torch.updates.publish import UpdateWriter
from peraxis_format.torch.updates.published import Published, UpdateOptions, Written
from peraxis_format.torch.updates.shared_mirror import SharedMirror
from peraxis_format.torch.updates.source import Way, chain_of
from peraxis_format.urls import is_url
from peraxis_format.writer import DeltaWriter

__all__ = ["ShardedUpdateWriter"]


class ShardedUpdateWriter(UpdateWriter):
    """Publishes the states of a model of DTensors (fully_shard, tensor parallel): see UpdateWriter.

    Every rank of the group makes one and calls `step`; tensors that are not DTensors must be equal on all of them. All
    ranks must see the folder, or it is a URL, which only rank 0 reads and writes. group: default all ranks.
    options: those of UpdateWriter. `step` returns or raises the same on every rank.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        folder: str | Path,
        *,
        group: Any = None,
        **options: Unpack[UpdateOptions],
    ) -> None:
        """Raises the errors of UpdateWriter. Collective, like `step`."""
        self._ranks = Ranks(group)
        self._shared: SharedMirror | None = None
        self._dtypes: dict[str, DType] = {}
        self._layouts: dict[str, Layout] = {}
        self._boxes: dict[str, Box] = {}
        self._pieces: dict[str, Array] = {}  # the published pieces of boxes that this rank sends
        super().__init__(model, folder, **options)

    def _placed(self, folder: str | Path) -> tuple[Mirror | None, Path]:
        """Rank 0 alone writes to a URL, so only there is a mirror."""
        if not is_url(folder):
            return None, Path(folder)
        self._shared = SharedMirror(str(folder), self._ranks.group)
        return self._shared.first, self._shared.folder

    def _together(self) -> AbstractContextManager[None]:
        return together(self._ranks.group)

    def prune(self, *, anchors: int = 2) -> list[Path | str]:
        """Delete old files, see UpdateWriter. Collective: rank 0 does this, and every rank returns them."""
        deleted: list[Path | str] = self._on_first(lambda: UpdateWriter.prune(self, anchors=anchors))
        return deleted

    def close(self) -> None:
        """Remove the local files of a chain at a URL."""
        if self._shared is not None:
            self._shared.close()

    def _step(self) -> Published:
        live, tied = self._live()
        if self._head is None:
            return self._publish_first(live, tied)
        number = self.step_number + 1
        with self._together():
            changes, outgoing = self._compared(live)
        incoming = self._ranks.all_to_all(outgoing)
        with self._together():
            made = self._merged(incoming)
        sent = {name: (each.module, each.changed) for name, each in made.items()}
        collected = self._ranks.gather(sent, on=0)
        modules = {name: found for each in collected for name, found in each.items()}
        path = self.folder / step_name(number)
        ordered, previous = (modules[name] for name in self._dtypes), self._head.content_id
        written: Written = self._on_first(lambda: self._write_update(path, ordered, tied, previous=previous))
        self._broken_off = True
        with self._together():
            for name, each in made.items():
                self._snapshot[name] = self._dtypes[name], each.new
                self._digests[name] = each.digest
            for name, (index, values) in changes.items():
                self._pieces[name].reshape(-1)[index] = values
        return self._done(path, number, written, tied)

    def _is_broken_off(self) -> bool:
        with self._together():
            mine = super()._is_broken_off()
        return any(self._ranks.all_gather(mine))

    def _check_own(self, head: UpdateFile | None, before: UpdateFile | None) -> None:
        """Rank 0 knows what it has written."""
        self._on_first(lambda: UpdateWriter._check_own(self, head, before))

    # --- the stages of a step -------------------------------------------------------------------------

    @property
    def _owners(self) -> dict[str, int]:
        return {name: turn % self._ranks.count for turn, name in enumerate(self._dtypes)}

    def _live(self) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
        """This rank's pieces, and (module, alias) of tied tensors. Before the first state boxes are exchanged."""
        with self._together():
            live, tied = live_tensors(self._model, in_pieces=True)
            found = {name: local_shard(tensor, whole(tensor.shape), name) for name, tensor in live.items()}
            boxes = {name: shard.box for name, shard in found.items()}
            dtypes = {name: published_dtype(name, tensor, self._dtype) for name, tensor in live.items()}
            self._check_same(live, boxes, dtypes)
        if self._head is None:
            shapes = {name: tuple(tensor.shape) for name, tensor in live.items()}
            known = self._ranks.all_gather((shapes, dtypes, tied, boxes))
            with self._together():
                check_ranks([each[:3] for each in known])
                self._layouts = {n: Layout.of(shapes[n], [each[3][n] for each in known]) for n in shapes}
                for name, layout in self._layouts.items():
                    layout.check_complete(name, "pass the group of all ranks that share the model")
            self._boxes, self._dtypes = boxes, dtypes
        return {name: shard.view for name, shard in found.items()}, tied

    def _check_same(self, live: Mapping[str, Tensor], boxes: Mapping[str, Box], dtypes: Mapping[str, DType]) -> None:
        """Check that the tensors are those of the published state."""
        if self._head is None:
            return
        odd = sorted(live.keys() ^ self._dtypes.keys())
        if odd:
            raise LiveModelError(f"{odd[0]}: was added or removed since {self._place} was begun; use a new folder")
        for name, tensor in live.items():
            moved = self._layouts[name].shape != tuple(tensor.shape) or self._boxes[name] != boxes[name]
            if moved or dtypes[name] is not self._dtypes[name]:
                raise LiveModelError(f"{name}: has another shape, dtype or placement than before; use a new folder")

    def _speaks_for(self, name: str) -> bool:
        return self._layouts[name].senders.get(self._boxes[name]) == self._ranks.rank

    def _compared(self, live: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The changes of this rank's pieces by name, and for each owner, with indices within the tensor."""
        changes: dict[str, Any] = {}
        outgoing: list[dict[str, Any]] = [{} for _ in range(self._ranks.count)]
        owners = self._owners
        for name, tensor in live.items():
            if not self._speaks_for(name):
                continue
            now, before = published_array(tensor, self._dtype).reshape(-1), self._pieces[name].reshape(-1)
            words = f"<u{now.dtype.itemsize}"
            index = np.flatnonzero(now.view(words) != before.view(words)).astype(np.int64)
            if index.size:
                self._finite.check(name, now[index], self._dtypes[name])
                changes[name] = index, now[index]
                flat = flat_indices(index, self._boxes[name], self._layouts[name].shape)
                outgoing[owners[name]][name] = flat, now[index]
        return changes, outgoing

    def _merged(self, incoming: list[dict[str, Any]]) -> dict[str, _Made]:
        """This rank's tensors after the changes of all ranks."""
        made: dict[str, _Made] = {}
        for name, (dtype, before) in self._snapshot.items():
            new, count = before, 0
            for each in incoming:
                if name in each:
                    new = before.copy() if new is before else new
                    index, values = each[name]
                    new.reshape(-1)[index] = values
                    count += index.size
            ref = BaseRef(dtype=dtype, shape=before.shape, sha256=self._digests[name])
            module = lossless_module(name, new, dtype, old=before, base=ref, prefer=self._prefer)
            digest = ref.sha256 if module.encoding is Encoding.SAME else module.result or digest_of(new)
            made[name] = _Made(module=module, changed=count, new=new, digest=digest)
        return made

    def _on_first(self, job: Any) -> Any:
        """Run a job on rank 0. Every rank returns its result or raises its error."""
        failure: BaseException | None = None
        result = None
        if self._ranks.rank == 0:
            try:
                result = job()
            except BaseException as error:  # an interrupt too: `agree` raises it again on every rank
                failure = error
        agree(failure, self._ranks.group)
        return self._ranks.broadcast(result, rank=0)

    def _is_there(self, path: Path) -> bool:
        found: bool = self._on_first(lambda: UpdateWriter._is_there(self, path))
        return found

    # --- whole states ---------------------------------------------------------------------------------

    def _publish_first(self, live: Mapping[str, Tensor], tied: list[tuple[str, str]]) -> Published:
        owners, failure = self._owners, KeptError()
        self._snapshot, self._digests, self._pieces = {}, {}, {}
        for name, tensor in live.items():
            piece: Array | None = None
            with failure:
                if self._speaks_for(name):
                    piece = self._pieces[name] = published_array(tensor, self._dtype)
                    self._finite.check(name, piece, self._dtypes[name])
            found = self._ranks.gather(None if piece is None else (self._boxes[name], piece), on=owners[name])
            if self._ranks.rank == owners[name]:
                with failure:
                    self._snapshot[name] = self._dtypes[name], self._joined(name, found)
                    self._digests[name] = digest_of(self._snapshot[name][1])
        agree(failure.error, self._ranks.group)
        path = self.folder / anchor_name(0)
        return self._done(path, 0, self._anchor(path, tied), tied)

    def _joined(self, name: str, pieces: list[tuple[Box, Array] | None]) -> Array:
        full: Array = np.empty(self._layouts[name].shape, self._dtypes[name].storage)
        for piece in pieces:
            if piece is not None:
                full[slices(piece[0])] = piece[1]
        return full

    def _anchor(self, path: Path, tied: list[tuple[str, str]]) -> Written:
        """Write the published state on rank 0, one tensor at a time from its owner."""
        owners, failure = self._owners, KeptError()
        with contextlib.ExitStack() as stack:
            writer: DeltaWriter | None = None
            with self._together():
                if self._ranks.rank == 0:
                    writer = stack.enter_context(self._to.writer(path, previous=None))
            for name, dtype in self._dtypes.items():
                mine = self._snapshot[name][1] if owners[name] == self._ranks.rank else None
                found = [array for array in self._ranks.gather(mine, on=0) if array is not None]
                with failure:
                    if writer is not None and failure.error is None:
                        full = found[0].reshape(self._layouts[name].shape)
                        writer.add(
                            ModuleDelta(name=name, shape=full.shape, dtype=dtype, encoding=Encoding.FULL, full=full)
                        )  # fmt: skip
            agree(failure.error, self._ranks.group)
            written: Written = self._on_first(lambda: self._finished(writer, tied))
            return written

    def _finished(self, writer: DeltaWriter | None, tied: list[tuple[str, str]]) -> Written | None:
        """Finish and send an anchor, on rank 0."""
        if writer is None:
            return None
        for name, alias in tied:
            writer.tie(name, alias)
        manifest = self._to.finish(writer)
        return Written(manifest=manifest, size=writer.size, changed=self._weights())

    def _weights(self) -> int:
        return sum(math.prod(layout.shape) for layout in self._layouts.values())

    def _check_continued(self) -> None:
        """Nothing to do: `_load` compares the tensors with those of the chain."""

    def _way(self) -> Way | None:
        if self._shared is not None:
            self._shared.sync(after=None)
        way: Way | None = self._on_first(lambda: chain_of(self.folder))
        return way

    def _load(self, way: Way) -> None:
        """Read the last state of a way: each owner its tensors, one file after the other, for all ranks."""
        self._live()
        with self._together():
            mine = {name for name, owner in self._owners.items() if owner == self._ranks.rank}
            owned = owned_state(way, self.folder, self._dtypes, self._layouts, mine=mine)
            digests = {name: digest_of(array) for name, array in owned.items()}
        pieces, failure = {}, KeptError()
        for name, owner in self._owners.items():
            cut: list[Array | None] = [None] * self._ranks.count
            with failure:
                if owner == self._ranks.rank:
                    for box, sender in self._layouts[name].senders.items():
                        cut[sender] = np.array(owned[name][slices(box)])
            piece: Array | None = self._ranks.scatter(cut, rank=owner)
            if piece is not None:
                pieces[name] = piece
        agree(failure.error, self._ranks.group)
        self._snapshot = {name: (self._dtypes[name], array) for name, array in owned.items()}
        self._digests, self._pieces = digests, pieces
        self._head = way.head
        self.step_number = way.head.step


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Made:
    """A tensor after a step. changed: weights that differ. digest: that of the new tensor."""

    module: ModuleDelta
    changed: int
    new: Array
    digest: str
