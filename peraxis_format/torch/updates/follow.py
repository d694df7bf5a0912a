"""apply_update: one exact update onto a live model, whole or not at all.

An update is proven before a weight is written: payload digests, decoding, and the digest of what each tensor becomes,
which also says that it is in the state that the update was made on. Then it is written, under the caller's lock. So an
update is applied whole or not at all, never twice and never out of order. What is staged is the update's own bytes and
a stretch of 2^20 weights (on a GPU 2^24), not a tensor; of an anchor all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peraxis_format.delta import Encoding, ModuleDelta
from peraxis_format.dtypes import Array, raw_bytes
from peraxis_format.errors import LiveModelError, PxdError, fail
from peraxis_format.ops.tensors import storage_array
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.place.binding import agree
from peraxis_format.torch.place.finder import named
from peraxis_format.torch.place.placement import place
from peraxis_format.torch.place.shards import Placement, Target, increment_versions, whole
from peraxis_format.torch.updates.proof import check_digest, stretches
from peraxis_format.torch.updates.source import UpdateFile, list_updates, next_update

__all__ = ["UpdateError", "apply_update", "in_pieces"]


class UpdateError(LiveModelError):
    """An update does not continue the model's state; the message names it and the reason."""


@torch.no_grad()
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
    DTensors, or with `shards` (names whose tensors are a plain local shard), is in pieces: every rank of the group
    calls this, and all of them hold the new state afterwards, or none.
    Raises PxdError where the file is damaged or the model is in another state (E404, E405), LiveModelError where it
    cannot hold the update. The model is then as it was.
    """
    pieces = in_pieces(target, shards)
    with contextlib.ExitStack() as stack:
        failure: Exception | None = None
        try:
            file = update if isinstance(update, DeltaFile) else stack.enter_context(DeltaFile(update))
            placement = place(target, file.manifest, shards=shards, exact=True)
            _refuse_others(file, placement, pieces=pieces)
        except (PxdError, LiveModelError, OSError) as error:
            if not pieces:
                raise
            failure = error
        if pieces:
            agree(failure, group)
            apply_sharded(file, placement, lock=lock, group=group)
            increment_versions(part for parts in placement.values() for part in parts)
            return
        modules = list(_proven(file, placement))
        with lock or contextlib.nullcontext(), torch.no_grad():
            _write(modules, placement)
        increment_versions(part for parts in placement.values() for part in parts)


def in_pieces(target: Target, shards: Mapping[str, Shard] | None) -> bool:
    """Whether ranks hold the model together."""
    return bool(shards) or any(map(is_dtensor, named(target).values()))


def _refuse_others(file: DeltaFile, placement: Placement, *, pieces: bool) -> None:
    """What is no exact update of contiguous tensors is not applied here."""
    for entry in file.manifest.modules:
        if entry.encoding is Encoding.SIGN or (entry.base is not None and entry.base.dtype is not entry.dtype):
            raise UpdateError(f"{file.path}: {entry.name} is no exact update; use apply_ or VariantSwitch")
        for part in () if pieces else placement[entry.name]:
            if part.box != whole(entry.shape) or not part.view.is_contiguous():
                raise UpdateError(f"{entry.name}: is strided, which exact updates do not reach")


def _proven(file: DeltaFile, placement: Placement) -> Iterator[ModuleDelta]:
    """Yield the modules to write, read once, after the digests of their old and new tensors are checked."""
    for entry in file.manifest.modules:
        module = file.load(entry.name)
        for part in placement[entry.name]:
            if entry.encoding is Encoding.EXACT:
                digest = hashlib.sha256()
                for _, stretch in stretches(part.view, module):
                    digest.update(raw_bytes(storage_array(stretch.cpu())))
                if digest.hexdigest() != entry.result:
                    fail("E405", field=entry.name)  # SPEC 7.4
            elif entry.base is not None:
                check_digest(entry, part.view)
        if entry.encoding is not Encoding.SAME:
            yield module


def _write(modules: list[ModuleDelta], placement: Placement) -> None:
    for module in modules:
        for part in placement[module.name]:
            if module.full is not None:
                part.view.copy_(_tensor(module.full.copy(), part.view))
            for live, stretch in stretches(part.view, module):
                live.copy_(stretch)
            part.publish()


def _tensor(array: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(array.reshape(-1).view("u1")).view(like.dtype).reshape(like.shape)


def follow(
    target: Target,
    source: str | Path,
    *,
    lock: AbstractContextManager[Any] | None = None,
    on_update: Callable[[Poll], None] | None = None,
) -> Follower:
    """Follow the chain in a folder: `poll()` once in a while, or `start()` a thread that does.

    target: a module or a mapping of names to tensors, at any state of the chain; at none of them it begins with the
    newest anchor. lock: held while weights are written, so that no forward pass sees half an update. on_update: called
    after each poll that applied something.
    """
    return Follower(target, Path(source), lock=lock, on_update=on_update)


class Follower:
    """A live model that follows a chain. step: of the state that it is at, None where it is at none that is known."""

    def __init__(
        self,
        target: Target,
        folder: Path,
        *,
        lock: AbstractContextManager[Any] | None = None,
        on_update: Callable[[Poll], None] | None = None,
    ) -> None:
        self.folder = folder
        self.step: int | None = None
        self._target = target
        self._lock = lock
        self._on_update = on_update
        self._state: str | None = None
        self._files: dict[Path, UpdateFile] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def poll(self) -> Poll:
        """Apply what the folder holds beyond the model's state, an update at a time.

        What cannot be applied is reported in `waiting`, and tried again at the next poll: a file may still be on its
        way. Where the link to the next state is missing, the newest anchor ahead is taken.
        """
        files, problems = list_updates(self.folder, self._files)
        waiting: dict[Path, str] = dict(problems)
        applied: list[Path] = []
        if self._state is None and files:
            self._find_state(files)
        while (chosen := next_update(files, self._state, self.step, skip=waiting)) is not None:
            try:
                apply_update(self._target, chosen.path, lock=self._lock)
            except (PxdError, LiveModelError, OSError) as error:
                waiting[chosen.path] = str(error)
                continue
            except BaseException:
                # Interrupted, maybe between two weights: the next poll looks what the model holds.
                self._state = self.step = None
                raise
            self._state, self.step = chosen.result, chosen.step
            applied.append(chosen.path)
        ahead = [file for file in files if not file.is_anchor and file.step > (-1 if self.step is None else self.step)]
        for file in ahead:
            waiting.setdefault(file.path, f"{file.path}: does not continue the state that the model is in")
        poll = Poll(step=self.step, applied=tuple(applied), lag=len(ahead), waiting=waiting)
        if applied and self._on_update is not None:
            self._on_update(poll)
        return poll

    def apply(self, path: str | Path) -> None:
        """Apply one file, which must continue the model's state. Raises UpdateError with its name, PxdError."""
        files, problems = list_updates(self.folder, self._files)
        found = next((file for file in files if file.path == Path(path)), None)
        if found is None:
            raise UpdateError(problems.get(Path(path), f"{path}: is no update of {self.folder}"))
        if self._state is None:
            self._find_state(files)
        if not found.is_anchor and found.base != self._state:
            known = {file.result: file for file in files}
            if self.step is not None and found.step <= self.step:
                raise UpdateError(f"{path}: is applied already, or of another chain; the model is at step {self.step}")
            reason = f"made on {known[found.base].path}" if found.base in known else "a gap in front of it"
            raise UpdateError(f"{path}: {reason}, but the model is at step {self.step}")
        apply_update(self._target, found.path, lock=self._lock)
        self._state, self.step = found.result, found.step

    def start(self, *, every: float = 1.0) -> Follower:
        """Poll every so many seconds on a thread of its own, until `close`."""
        if self._thread is not None:
            raise LiveModelError("this follower runs already")

        def run() -> None:
            while not self._stop.wait(every):
                self.poll()

        self._thread = threading.Thread(target=run, daemon=True, name="peraxis-follow")
        self._thread.start()
        return self

    def wait(self, step: int, *, seconds: float = 60.0) -> bool:
        """Wait until the model is at this step or beyond. Returns whether it is."""
        end = time.monotonic() + seconds
        while (self.step is None or self.step < step) and time.monotonic() < end:
            time.sleep(0.01)
        return self.step is not None and self.step >= step

    def close(self) -> None:
        """End the thread, after the update that it is at."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _find_state(self, files: list[UpdateFile]) -> None:
        """Which state of the chain the model is at, the newest first; by the digests of its tensors."""
        digests: dict[str, str] = {}
        for file in reversed(files):
            with DeltaFile(file.path) as delta:
                if self._is_at(delta, digests):
                    self._state, self.step = file.result, file.step
                    return
        first = next((file for file in files if not file.is_anchor), None)
        if first is not None:
            with DeltaFile(first.path) as delta:
                if self._is_at(delta, digests, before=True):
                    self._state, self.step = first.base, first.step - 1

    def _is_at(self, delta: DeltaFile, digests: dict[str, str], *, before: bool = False) -> bool:
        """Whether every tensor of the model is what a file results in, or was made on."""
        try:
            placement = place(self._target, delta.manifest, exact=True)
        except (PxdError, LiveModelError):
            return False
        for entry in delta.manifest.modules:
            base = None if entry.base is None else entry.base.sha256
            wanted = base if before or entry.encoding is Encoding.SAME else entry.result or entry.sha256
            if entry.name not in digests:
                view = placement[entry.name][0].view.detach().cpu().contiguous()
                digests[entry.name] = hashlib.sha256(raw_bytes(storage_array(view))).hexdigest()
            if digests[entry.name] != wanted:
                return False
        return True
