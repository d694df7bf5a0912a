"""ShardedUpdateWriter: UpdateWriter for a sharded model, which is not assembled on any rank.

Each tensor has an owner, the rank that encodes it. The owner keeps the published tensor; every rank also keeps its own
published pieces. At a step each rank compares its pieces and sends changes, indices and values, to the owners; they
encode and hash, and rank 0 writes the file. So a rank holds twice its share of the model in host memory, and the
traffic is O(changes). Only the first state is sent whole, once, tensor by tensor; anchors are sent whole to rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from peraxis_format.delta import BaseRef, Encoding, ModuleDelta
from peraxis_format.dtypes import Array, DType, digest_of
from peraxis_format.errors import LiveModelError
from peraxis_format.exact import lossless_module
from peraxis_format.ops.rebuild import reconstruct
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.place.finder import local_part
from peraxis_format.torch.place.pieces import Layout, flat_indices
from peraxis_format.torch.place.ranks import Ranks, agree
from peraxis_format.torch.place.shards import Box, slices, whole
from peraxis_format.torch.updates.live import live_tensors
from peraxis_format.torch.updates.mirror import Mirror, is_url
from peraxis_format.torch.updates.publish import Published, UpdateOptions, UpdateWriter, Written
from peraxis_format.torch.updates.shared_mirror import SharedMirror
from peraxis_format.torch.updates.source import Way, anchor_name, chain_of, step_name
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
        """Raises the errors of UpdateWriter. Collective, like all methods except `prune`."""
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

    def prune(self, *, anchors: int = 2) -> list[Path]:
        """Delete old files, see UpdateWriter. Rank 0 does this; other ranks return an empty list."""
        return super().prune(anchors=anchors) if self._ranks.rank == 0 else []

    def close(self) -> None:
        """Remove the local files of a chain at a URL."""
        if self._shared is not None:
            self._shared.close()

    @torch.no_grad()
    def step(self) -> Published:
        """Publish the present parameters; see UpdateWriter."""
        live, tied = live_tensors(self._model, in_pieces=True)
        parts = self._parts(live)
        if self._head is None:
            return self._publish_first(parts, tied)
        number = self.step_number + 1
        changes, outgoing = self._compared(parts)
        incoming = self._ranks.all_to_all(outgoing)
        made = self._merged(incoming)
        collected = self._ranks.gather({name: (module, count) for name, (module, count, _) in made.items()}, on=0)
        modules = {name: found for each in collected for name, found in each.items()}
        path = self.folder / step_name(number)
        ordered, previous = (modules[name] for name in self._dtypes), self._head.content_id
        written: Written = self._on_first(lambda: self._write_update(path, ordered, tied, previous=previous))
        for name, (module, _, new) in made.items():
            if module.encoding is not Encoding.SAME:
                self._snapshot[name] = self._dtypes[name], new
                self._digests[name] = module.result or digest_of(new)
        for name, (index, values) in changes.items():
            self._pieces[name].reshape(-1)[index] = values
        return self._done(path, number, written, tied)

    # --- the parts of a step --------------------------------------------------------------------------

    @property
    def _owners(self) -> dict[str, int]:
        return {name: turn % self._ranks.count for turn, name in enumerate(self._dtypes)}

    def _parts(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's pieces. The first call exchanges the boxes of all ranks."""
        failure: Exception | None = None
        parts: dict[str, Tensor] = {}
        try:
            found = {name: local_part(tensor, whole(tensor.shape), name) for name, tensor in live.items()}
            parts = {name: part.view for name, part in found.items()}
            boxes = {name: part.box for name, part in found.items()}
            dtypes = {name: self._dtype_of(name, tensor) for name, tensor in live.items()}
            self._check_same(live, boxes, dtypes)
        except LiveModelError as error:
            failure = error
        agree(failure, self._ranks.group)
        if not self._layouts:
            known = self._ranks.all_gather(boxes)
            self._layouts = {n: Layout.of(t.shape, [each[n] for each in known]) for n, t in live.items()}
            self._boxes, self._dtypes = boxes, dtypes
        return parts

    def _check_same(self, live: Mapping[str, Tensor], boxes: Mapping[str, Box], dtypes: Mapping[str, DType]) -> None:
        if not self._dtypes:
            return
        odd = sorted(live.keys() ^ self._dtypes.keys())
        if odd:
            raise LiveModelError(f"{odd[0]}: was added or removed since {self.folder} was begun; use a new folder")
        for name, tensor in live.items():
            layout = self._layouts.get(name)
            moved = layout is not None and (layout.shape != tuple(tensor.shape) or self._boxes[name] != boxes[name])
            if moved or dtypes[name] is not self._dtypes[name]:
                raise LiveModelError(f"{name}: has another shape, dtype or placement than before; use a new folder")

    def _speaks_for(self, name: str) -> bool:
        return self._layouts[name].senders.get(self._boxes[name]) == self._ranks.rank

    def _compared(self, parts: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The changes of this rank's pieces by name, and for each owner, with indices within the tensor."""
        changes: dict[str, Any] = {}
        outgoing: list[dict[str, Any]] = [{} for _ in range(self._ranks.count)]
        owners = self._owners
        for name, part in parts.items():
            if not self._speaks_for(name):
                continue
            now, before = self._published(part).reshape(-1), self._pieces[name].reshape(-1)
            words = f"<u{now.dtype.itemsize}"
            index = np.flatnonzero(now.view(words) != before.view(words)).astype(np.int64)
            if index.size:
                changes[name] = index, now[index]
                flat = flat_indices(index, self._boxes[name], self._layouts[name].shape)
                outgoing[owners[name]][name] = flat, now[index]
        return changes, outgoing

    def _merged(self, incoming: list[dict[str, Any]]) -> dict[str, tuple[ModuleDelta, int, Array]]:
        """The modules of this rank's tensors, their numbers of changed weights, and the new tensors."""
        made = {}
        for name, (dtype, before) in self._snapshot.items():
            new, count = before, 0
            for each in incoming:
                if name in each:
                    new = before.copy() if new is before else new
                    index, values = each[name]
                    new.reshape(-1)[index] = values
                    count += index.size
            ref = BaseRef(dtype=dtype, shape=before.shape, sha256=self._digests[name])
            made[name] = lossless_module(name, new, dtype, old=before, base=ref, prefer=self._prefer), count, new
        return made

    def _on_first(self, job: Any) -> Any:
        """Run a job on rank 0. Every rank returns its result or raises its error."""
        failure, result = None, None
        if self._ranks.rank == 0:
            try:
                result = job()
            except Exception as error:
                failure = error
        agree(failure, self._ranks.group)
        return self._ranks.broadcast(result, rank=0)

    def _is_there(self, path: Path) -> bool:
        found: bool = self._on_first(lambda: UpdateWriter._is_there(self, path))
        return found

    # --- whole states ---------------------------------------------------------------------------------

    def _publish_first(self, parts: Mapping[str, Tensor], tied: list[tuple[str, str]]) -> Published:
        owners = self._owners
        for name, part in parts.items():
            piece = self._published(part) if self._speaks_for(name) else None
            if piece is not None:
                self._pieces[name] = piece
            found = self._ranks.gather(None if piece is None else (self._boxes[name], piece), on=owners[name])
            if self._ranks.rank == owners[name]:
                self._snapshot[name] = self._dtypes[name], self._joined(name, found)
                self._digests[name] = digest_of(self._snapshot[name][1])
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
        owners = self._owners
        failure: Exception | None = None
        result = None
        writer: DeltaWriter | None = None
        try:
            writer = self._writer(path, previous=None) if self._ranks.rank == 0 else None
        except OSError as error:
            failure = error
        agree(failure, self._ranks.group)
        try:
            for name, dtype in self._dtypes.items():
                mine = self._snapshot[name][1] if owners[name] == self._ranks.rank else None
                found = [array for array in self._ranks.gather(mine, on=0) if array is not None]
                if writer is None or failure is not None:
                    continue
                try:
                    shape = self._layouts[name].shape
                    full = found[0].reshape(shape)
                    writer.add(
                        ModuleDelta(name=name, shape=shape, dtype=dtype, encoding=Encoding.FULL, full=full)
                    )  # fmt: skip
                except Exception as error:
                    failure = error
            if writer is not None and failure is None:
                for name, alias in tied:
                    writer.tie(name, alias)
                try:
                    result = Written(manifest=writer.finish(), size=writer.size, changed=self._weights())
                except Exception as error:
                    failure = error
        finally:
            if writer is not None:
                writer.__exit__(None, None, None)
        try:
            if result is not None:
                self._send(path)
        except Exception as error:
            failure = error
        agree(failure, self._ranks.group)
        said: Written = self._ranks.broadcast(result, rank=0)
        return said

    def _weights(self) -> int:
        return sum(math.prod(layout.shape) for layout in self._layouts.values())

    def _restore(self) -> None:
        """Update tensors and pieces to the last state of the folder, one tensor at a time."""
        if self._shared is not None:
            self._shared.sync(after=None)
        way: Way | None = self._on_first(lambda: chain_of(self.folder))
        if way is None:
            return
        live, _ = live_tensors(self._model, in_pieces=True)
        paths = [self.folder / file.path.name for file in (way.anchor, *way.updates)]
        with DeltaFile(paths[0]) as anchor:
            known = {entry.name: (entry.shape, entry.dtype) for entry in anchor.manifest.modules}
        self._dtypes = {name: dtype for name, (_, dtype) in known.items()}
        other = next((n for n, (shape, _) in known.items() if n in live and tuple(live[n].shape) != shape), None)
        if other is not None:
            raise LiveModelError(f"{other}: has another shape or dtype than in {self.folder}; use a new folder")
        parts = self._parts(live)
        files = [DeltaFile(path) for path in paths]
        try:
            for name in parts:
                self._restore_tensor(name, files)
        finally:
            for file in files:
                file.close()
        self._head = way.head
        self.step_number = way.head.step

    def _restore_tensor(self, name: str, files: list[DeltaFile]) -> None:
        owner = self._owners[name] == self._ranks.rank
        if not owner and not self._speaks_for(name):
            return
        array = np.array(reconstruct(files[0].load(name)))
        for file in files[1:]:
            if file.entry(name).encoding is not Encoding.SAME:
                array = reconstruct(file.load(name), array)
        if self._speaks_for(name):
            self._pieces[name] = np.array(array[slices(self._boxes[name])])
        if owner:
            self._snapshot[name] = self._dtypes[name], array
            self._digests[name] = digest_of(array)
