"""UpdateWriter: the trainer's side of a chain.

    folder/anchor-00000000.pxd      the whole first state of the chain
    folder/step-00000001.pxd        the changes since, bit for bit; `previous` is the file before it

Law: the files in the folder always lead to the published state, even if the process is killed. An update appears by a
rename; only then the snapshot of the published state is updated, and a new process rebuilds it from the folder.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

from peraxis_format.arguments import check_choice, check_least
from peraxis_format.chain_names import anchor_name, step_name
from peraxis_format.delta import BaseRef, Encoding, ModuleDelta
from peraxis_format.dtypes import Array, DType, digest_of
from peraxis_format.errors import LiveModelError
from peraxis_format.exact import count_changed, lossless_module
from peraxis_format.manifest import CHANGED_KEY, Manifest
from peraxis_format.ops.exact import Prefer, apply
from peraxis_format.ops.rebuild import reconstruct
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.modes import allocates
from peraxis_format.torch.updates.destination import Destination
from peraxis_format.torch.updates.finite import FiniteCheck, Nonfinite
from peraxis_format.torch.updates.listing import UpdateFile
from peraxis_format.torch.updates.live import check_publishing, live_tensors, published_array, published_dtype
from peraxis_format.torch.updates.mirror import Mirror
from peraxis_format.torch.updates.published import Published, Written
from peraxis_format.torch.updates.source import Way, chain_of
from peraxis_format.urls import is_url

__all__ = ["UpdateWriter"]

_LOGGER: Final = logging.getLogger("peraxis")


class UpdateWriter:
    """Publishes the states of live parameters as a chain of exact updates: into a folder, or to a URL.

    model: a module, or a mapping of names to tensors, which is read at each step. dtype: the dtype that float32 tensors
    are published in; None publishes them unchanged. anchor_every: the number of steps between whole states, from which
    a server can begin, so that older files can be deleted (`prune`). nonfinite: whether NaN and infinite weights are
    published with warnings, or make a step an error. An existing chain in the folder is continued. step_number: the
    number of the last published state. For DTensors use ShardedUpdateWriter.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        folder: str | Path,
        *,
        name: str = "model",
        dtype: torch.dtype | None = torch.bfloat16,
        prefer: Prefer = "size",
        anchor_every: int | None = None,
        nonfinite: Nonfinite = "warn",
    ) -> None:
        """Raises LiveModelError if the folder's chain has other tensors, PxdError if it is damaged, ArgumentError."""
        with self._together():
            check_choice("prefer", prefer, get_args(Prefer))
            check_least("anchor_every", anchor_every, 1)
            self._finite = FiniteCheck(nonfinite)
            check_publishing(model, folder, dtype)
        self._mirror, self.folder = self._placed(folder)
        self._url = str(folder).rstrip("/") if is_url(folder) else None
        self._place: Path | str = self._url or self.folder
        self._to = Destination(self.folder, name=name, mirror=self._mirror)
        self.step_number = 0
        self._model = model
        self._dtype = dtype
        self._prefer: Prefer = prefer
        self._anchor_every = anchor_every
        self._snapshot: dict[str, tuple[DType, Array]] = {}
        self._digests: dict[str, str] = {}
        self._head: UpdateFile | None = None
        self._told_gone = False
        self._broken_off = False  # whether the snapshot may not be the last published state
        with self._together():
            self.folder.mkdir(parents=True, exist_ok=True)
        self._restore()
        self._check_continued()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} to {self._place}: step {self.step_number}>"

    def _shown(self, path: Path) -> Path | str:
        """The place of a file of the chain: its path or URL."""
        return path if self._url is None else f"{self._url}/{path.name}"

    def _together(self) -> AbstractContextManager[None]:
        """The context of a part of a method that is not collective; ShardedUpdateWriter's raises on all ranks."""
        return contextlib.nullcontext()

    def _placed(self, folder: str | Path) -> tuple[Mirror | None, Path]:
        """The mirror of a URL, and the local folder."""
        if not is_url(folder):
            return None, Path(folder)
        mirror = Mirror(str(folder))
        return mirror, mirror.folder

    @property
    def result(self) -> str | None:
        """The digest over the published state; None before the first step."""
        return None if self._head is None else self._head.result

    @allocates()
    def step(self) -> Published:
        """Publish the present parameters. The first call in a folder writes an anchor, later ones write updates.

        Raises FileExistsError if another process publishes into the folder, OSError, LiveModelError for tensors that
        are not those of the chain or that `nonfinite` refuses; nothing is published then, unless the folder or
        store took the file and only then failed, or only the anchor of the step cannot be written: see `step_number`.
        After an interrupt, and after such a failure, the next step first reads what was published.
        """
        self._recover()
        try:
            return self._step()
        except BaseException as error:  # after an Exception nothing was published, or `_broken_off` is set
            self._broken_off = self._broken_off or not isinstance(error, Exception)
            raise

    def _step(self) -> Published:
        live, tied = live_tensors(self._model, in_pieces=False)
        if self._head is None:
            return self._first(live, tied)
        self._check_names(live)
        number = self.step_number + 1
        path = self.folder / step_name(number)
        moved: list[ModuleDelta] = []
        written = self._write_update(path, self._encoded(live, moved), tied, previous=self._head.content_id)
        # The update is published; the rest only updates this process's snapshot.
        self._broken_off = True
        for module in moved:
            self._promote(module)
        return self._done(path, number, written, tied)

    def prune(self, *, anchors: int = 2) -> list[Path | str]:
        """Delete the files before the oldest of the newest `anchors` anchors. Returns paths or URLs, oldest first.

        Files are deleted oldest first, so that the rest is always a chain. Raises ArgumentError for fewer than one.
        """
        check_least("anchors", anchors, 1)  # one must stay as the beginning of the chain
        return self._to.prune(anchors)

    def close(self) -> None:
        """Remove the local files of a chain at a URL; the end of `with` does so too."""
        if self._mirror is not None:
            self._mirror.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- the live state -------------------------------------------------------------------------------

    def _encoded(self, live: Mapping[str, Tensor], moved: list[ModuleDelta]) -> Iterator[tuple[ModuleDelta, int]]:
        """Yield each tensor's module and the number of its changed weights; modules with changes go to `moved` too."""
        for name, tensor in live.items():
            dtype, before = self._snapshot[name]
            after = published_array(tensor, self._dtype)
            ref = BaseRef(dtype=dtype, shape=before.shape, sha256=self._digests[name])
            module = lossless_module(name, after, dtype, old=before, base=ref, prefer=self._prefer)
            if module.encoding is Encoding.SAME:
                yield module, 0
                continue
            self._finite.check(name, after, dtype)
            moved.append(module)
            yield module, count_changed(before, after)

    def _check_continued(self) -> None:
        """Check that the tensors are those of the chain that is continued."""
        if self._head is not None:
            self._check_names(live_tensors(self._model, in_pieces=False)[0])

    def _check_names(self, live: Mapping[str, Tensor]) -> None:
        odd = sorted(live.keys() ^ self._snapshot.keys())
        if odd:
            raise LiveModelError(f"{odd[0]}: was added or removed since {self._place} was begun; use a new folder")
        for name, tensor in live.items():
            dtype, array = self._snapshot[name]
            if tuple(tensor.shape) != array.shape or published_dtype(name, tensor, self._dtype) is not dtype:
                raise LiveModelError(f"{name}: has another shape or dtype than in {self._place}; use a new folder")

    # --- the published state --------------------------------------------------------------------------

    def _write_update(
        self, path: Path, modules: Iterable[tuple[ModuleDelta, int]], tied: list[tuple[str, str]], *, previous: str
    ) -> Written:
        """Write and send an update. modules: each with the number of its changed weights."""
        changed = 0
        with self._to.writer(path, previous=previous) as writer:
            for module, count in modules:
                writer.add(module)
                changed += count
            for name, alias in tied:
                writer.tie(name, alias)
            writer.metadata[CHANGED_KEY] = str(changed)
            manifest = self._to.finish(writer)
        return Written(manifest=manifest, size=writer.size, changed=changed)

    def _is_there(self, path: Path) -> bool:
        return self._to.has(path.name)

    def _first(self, live: Mapping[str, Tensor], tied: list[tuple[str, str]]) -> Published:
        self._snapshot = {
            name: (published_dtype(name, tensor, self._dtype), published_array(tensor, self._dtype))
            for name, tensor in live.items()
        }
        for name, (dtype, array) in self._snapshot.items():
            self._finite.check(name, array, dtype)
        self._digests = {name: digest_of(array) for name, (_, array) in self._snapshot.items()}
        path = self.folder / anchor_name(0)
        return self._done(path, 0, self._anchor(path, tied), tied)

    def _anchor(self, path: Path, tied: list[tuple[str, str]]) -> Written:
        """Write and send the whole published state."""
        with self._to.writer(path, previous=None) as writer:
            for name, (dtype, array) in self._snapshot.items():
                writer.add(ModuleDelta(name=name, shape=array.shape, dtype=dtype, encoding=Encoding.FULL, full=array))
            for name, alias in tied:
                writer.tie(name, alias)
            manifest = self._to.finish(writer)
        return Written(manifest=manifest, size=writer.size, changed=self._weights())

    def _weights(self) -> int:
        """The number of weights of the published state."""
        return sum(array.size for _, array in self._snapshot.values())

    def _promote(self, module: ModuleDelta) -> None:
        dtype, array = self._snapshot[module.name]
        if module.index is not None and module.data is not None and module.result is not None:
            apply(array, module.index, module.data, dtype)
            self._digests[module.name] = module.result
        elif module.full is not None:
            array[...] = module.full
            self._digests[module.name] = digest_of(array)

    def _done(self, path: Path, number: int, written: Written, tied: list[tuple[str, str]]) -> Published:
        """Record a published file, and write an anchor beside it if one is due."""
        manifest = written.manifest
        self._reached(path, number, manifest)
        self._broken_off = False
        beside = self.folder / anchor_name(number)
        due = self._anchor_every is not None and number > 0 and number % self._anchor_every == 0
        if due and not self._is_there(beside):
            self._anchor(beside, tied)
        if number > 0 and not due:
            self._warn_gone(number - 1)
        return Published(
            path=self._shown(path),
            step=number,
            content_id=manifest.content_id,
            result=manifest.result or "",
            changed=written.changed,
            weights=self._weights(),
            bytes=written.size,
        )

    def _warn_gone(self, step: int) -> None:
        """Warn once if a published step is gone from a folder. Something else may ship files and delete them."""
        before = [self.folder / step_name(step), self.folder / anchor_name(step)]
        if self._url is None and not self._told_gone and not any(map(self._is_there, before)):
            self._told_gone = True
            gone = before[step == 0]
            _LOGGER.warning("%s: is gone; a server that does not have it can go on from the next anchor only", gone)

    def _reached(self, path: Path, number: int, manifest: Manifest) -> None:
        """Record that the state of this file was published last."""
        self.step_number = number
        self._head = UpdateFile.of(path, manifest, step=number, is_anchor=number == 0)

    def _recover(self) -> None:
        """After a step that was broken off, read the published state again. Raises LiveModelError if it is gone."""
        if self._is_broken_off():
            before, self._head = self._head, None
            try:
                way = self._way()
                self._check_own(None if way is None else way.head, before)  # only then the own state may change
                if way is not None:
                    self._load(way)
            except BaseException:
                self._head, self._broken_off = before, True
                raise
            if self._head is None and before is not None:
                self._head = before
                raise LiveModelError(f"{self._place}: has no chain any more; publish to a new folder")
            self._broken_off = False

    def _is_broken_off(self) -> bool:
        return self._broken_off or self._to.is_in_doubt()

    def _check_own(self, head: UpdateFile | None, before: UpdateFile | None) -> None:
        """Check that no other process has published since `before`. head: the last file of the folder."""
        self._to.check_own(head, before)

    def _restore(self) -> None:
        """Update the snapshot to the last state of the folder, if it has a chain."""
        way = self._way()
        if way is not None:
            self._load(way)

    def _way(self) -> Way | None:
        """The way to the last state of the folder, by the headers of its files."""
        if self._mirror is not None:
            self._mirror.sync(after=None)
        return chain_of(self.folder)

    def _load(self, way: Way) -> None:
        """Update the snapshot to the last state of a way."""
        self._load_anchor(way.anchor)
        for update in way.updates:
            self._promote_file(update)
        self._head = way.head
        self.step_number = way.head.step

    def _load_anchor(self, anchor: UpdateFile) -> None:
        with DeltaFile(anchor.path) as delta:
            for entry in delta.manifest.modules:
                if entry.base is not None:
                    raise LiveModelError(
                        f"{self._shown(anchor.path)}: {entry.name} has a base, so this is no anchor; use a new folder"
                    )
                array = np.array(reconstruct(delta.load(entry.name)))
                self._snapshot[entry.name] = entry.dtype, array
                self._digests[entry.name] = digest_of(array)

    def _promote_file(self, update: UpdateFile) -> None:
        with DeltaFile(update.path) as delta:
            for entry in delta.manifest.modules:
                if entry.name not in self._snapshot:
                    raise LiveModelError(
                        f"{entry.name}: is in {self._shown(update.path)}, but not before it; use a new folder"
                    )
                if entry.encoding is not Encoding.SAME:
                    dtype, array = self._snapshot[entry.name]
                    self._snapshot[entry.name] = dtype, reconstruct(delta.load(entry.name), array)
                    self._digests[entry.name] = digest_of(self._snapshot[entry.name][1])
