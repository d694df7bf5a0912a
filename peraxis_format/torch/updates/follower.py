"""Follower: the server's side of a chain. It polls a folder or a URL, and applies new updates."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from peraxis_format.arguments import check_path
from peraxis_format.delta import Encoding
from peraxis_format.dtypes import digest_of
from peraxis_format.errors import ArgumentError, BindingError, LiveModelError, PxdError, TornError, first_line
from peraxis_format.ops.tensors import storage_array
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.place.finder import check_target
from peraxis_format.torch.place.pieces import in_pieces, sharded_digest
from peraxis_format.torch.place.placement import place
from peraxis_format.torch.place.ranks import Ranks, together
from peraxis_format.torch.place.shards import Placement, Shard, Target, own_piece
from peraxis_format.torch.updates.apply import apply_update
from peraxis_format.torch.updates.errors import UpdateError, advised
from peraxis_format.torch.updates.listing import AWAITED, OtherFile, UpdateFile, list_updates, missing_folder
from peraxis_format.torch.updates.mirror import Mirror
from peraxis_format.torch.updates.shared_mirror import SharedMirror
from peraxis_format.torch.updates.source import next_update, standing
from peraxis_format.urls import is_url

__all__ = ["Follower", "Poll", "follow"]

_LOGGER: Final = logging.getLogger("peraxis")


@dataclass(frozen=True, slots=True, kw_only=True)
class Poll:
    """The result of one poll of the folder. step: the model's step now, None if its state is not in the chain.

    applied: files, in order. lag: the number of newer updates in the folder. waiting: the reason of a delay, by file;
    the folder's own reason is that it does not exist, or that it has another chain now. An update with the name of no
    step is passed over, and waits too.
    """

    step: int | None
    applied: tuple[Path, ...]
    lag: int
    waiting: Mapping[Path, str] = field(default_factory=dict)


def follow(
    target: Target,
    source: str | Path,
    *,
    lock: AbstractContextManager[Any] | None = None,
    on_update: Callable[[Poll], None] | None = None,
    shards: Mapping[str, Shard] | None = None,
    group: Any = None,
) -> Follower:
    """Follow the chain in a folder or at a URL: call `poll()` repeatedly, or `start()` a thread that does.

    target: a module or a mapping of names to tensors, in any state of the chain; in another state it begins with the
    newest anchor. lock: held while weights are written, so that no forward pass sees half an update. on_update: called
    after each poll that applied an update. shards: as in apply_. group: that of a sharded model, whose ranks see
    one folder, or follow one URL, and poll together, equally often; with `start`, a group that no other code uses.
    Tensors of the target that the chain lacks are named by a warning of the logger `peraxis`, and stay as they are.
    Raises LiveModelError for a target that is no model, and for a URL whose package is not installed; ArgumentError.
    """
    return Follower(target, source, lock=lock, on_update=on_update, shards=shards, group=group)


class Follower:
    """A live model that follows a chain. step: the step of its state, None if it is unknown."""

    def __init__(
        self,
        target: Target,
        folder: str | Path,
        *,
        lock: AbstractContextManager[Any] | None = None,
        on_update: Callable[[Poll], None] | None = None,
        shards: Mapping[str, Shard] | None = None,
        group: Any = None,
    ) -> None:
        check_path("source", folder)
        check_target(target)
        self._mirror: Mirror | SharedMirror | None = None
        if is_url(folder):
            sharded = in_pieces(target, shards)
            self._mirror = SharedMirror(str(folder), group) if sharded else Mirror(str(folder))
        self.folder = Path(folder) if self._mirror is None else self._mirror.folder
        self.step: int | None = None
        self._target = target
        self._lock = lock
        self._shards, self._group = shards, group
        self._on_update = on_update
        self._state: str | None = None
        self._writes = False  # whether an update has begun and not ended, so that the state is not known
        self._noticed: str | None = None  # the reported other chain
        self._compared = False  # whether the model's tensors were compared with those of the chain
        self._files: dict[Path, UpdateFile | OtherFile] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if (reason := missing_folder(self.folder)) is not None:
            _LOGGER.warning("%s; %s", reason, AWAITED)

    def __repr__(self) -> str:
        at = "unknown state" if self.step is None else f"step {self.step}"
        return f"<Follower of {self.folder if self._mirror is None else self._mirror.url}: {at}>"

    def poll(self) -> Poll:
        """Apply the folder's updates after the model's state, one at a time.

        Files that cannot be applied are reported in `waiting` and tried again at the next poll, because a file may be
        incomplete. If the update to the next state is missing, the newest anchor ahead is taken.
        Raises TornError if weights were written in part, and the error of `on_update`, which comes after the updates
        were applied; on all ranks of a sharded model.
        """
        files, problems = self._listed()
        waiting: dict[Path, str] = dict(problems)
        applied: list[Path] = []
        failed = [path for path in problems if path.parent == self.folder]
        self._know_state(files)
        found_again = False
        while (chosen := next_update(files, self._state, self.step, skip=waiting)) is not None:
            try:
                self._apply(chosen)
            except TornError:
                raise
            except (PxdError, LiveModelError, OSError) as error:
                if isinstance(error, BindingError) and not found_again:
                    found_again = True
                    if self._has_moved(files):
                        continue
                waiting[chosen.path] = str(error)
                failed.append(chosen.path)
                continue
            applied.append(chosen.path)
        if self._mirror is not None:
            self._mirror.doubt(path.name for path in failed)
        source = self.folder if self._mirror is None else self._mirror.url
        found = standing(files, self._state, self.step, waiting, source=source, noticed=self._noticed)
        self.step, self._noticed = found.step, found.other
        poll = Poll(step=self.step, applied=tuple(applied), lag=found.lag, waiting=waiting)
        if applied:
            with together(self._group, sharded=in_pieces(self._target, self._shards)):
                if self._on_update is not None:
                    self._on_update(poll)
        return poll

    def apply(self, path: str | Path) -> None:
        """Apply one file, which must continue the model's state.

        Raises UpdateError with its name, PxdError, LiveModelError if the model cannot take it, TornError if weights
        were written in part.
        """
        files, problems = self._listed()
        found = next((file for file in files if file.path == Path(path)), None)
        if found is None:
            raise UpdateError(problems.get(Path(path), f"{path}: is not an update of {self.folder}"))
        self._know_state(files)
        if not found.is_anchor and found.base != self._state:
            known = {file.result: file for file in files}
            if self.step is not None and found.step <= self.step:
                raise UpdateError(f"{path}: is already applied, or of another chain; the model is at step {self.step}")
            reason = f"made on {known[found.base].path}" if found.base in known else "a gap in front of it"
            raise UpdateError(f"{path}: {reason}, but the model is at step {self.step}")
        self._apply(found)

    def start(self, *, every: float = 1.0) -> Follower:
        """Poll every `every` seconds on a thread, until `close`. A failure is logged and tried again.

        The ranks of a sharded model poll together, until the first of them calls `close`. Raises ArgumentError unless
        `every` is above 0.
        """
        if not 0.0 < every < math.inf:
            raise ArgumentError(f"every {every!r}: must be a number of seconds above 0")
        if self._thread is not None:
            raise LiveModelError("this follower is already running; close it first")

        sharded = in_pieces(self._target, self._shards) and Ranks(self._group).count > 1

        def run() -> None:
            while not self._stop.wait(every) or sharded:
                try:
                    if sharded and any(Ranks(self._group).all_gather(self._stop.is_set())):
                        return
                    self.poll()
                except Exception as error:  # a failed poll must not end the thread
                    _LOGGER.error("%s: cannot be followed: %s; trying again", self.folder, first_line(error))
                    if self._stop.is_set():  # the other ranks may be gone
                        return

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
        """End the thread after its current update, on all ranks of a sharded model at their next poll."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._mirror is not None:
            self._mirror.close()

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _listed(self) -> tuple[list[UpdateFile], dict[Path, str]]:
        """The files of the folder; for a URL those still needed; for a sharded model those that its first rank sees."""
        unreachable: dict[Path, str] = {}
        if self._mirror is not None:
            try:
                self._mirror.sync(after=self.step, others=True)
            except OSError as error:
                unreachable[Path(self._mirror.url)] = str(error)
        sharded = in_pieces(self._target, self._shards)
        found: tuple[list[UpdateFile], dict[Path, str]] = [], {}
        with together(self._group, sharded=sharded):
            if not sharded or Ranks(self._group).rank == 0:
                found = list_updates(self.folder, self._files, url=None if self._mirror is None else self._mirror.url)
        files, problems = Ranks(self._group).broadcast(found, rank=0) if sharded else found
        return files, problems | unreachable

    def _apply(self, update: UpdateFile) -> None:
        """Apply a file, which must be the one that was listed. Raises UpdateError, PxdError."""
        self._writes = True
        try:
            with contextlib.ExitStack() as stack:
                with together(self._group, sharded=in_pieces(self._target, self._shards)):
                    delta = stack.enter_context(DeltaFile(self._here(update)))
                    if delta.content_id != update.content_id:
                        raise UpdateError(f"{update.path}: was replaced by another file; it is tried again")
                with advised(update.previous, follows=True):
                    apply_update(self._target, delta, lock=self._lock, shards=self._shards, group=self._group)
                self._warn_left_out(delta)
        except TornError:
            raise
        except (PxdError, LiveModelError, OSError):
            self._writes = False
            raise
        self._state, self.step = update.result, update.step
        self._writes = False

    def _warn_left_out(self, delta: DeltaFile) -> None:
        """Warn once of tensors of the model that the chain lacks: they stay as they are, whatever the trainer does."""
        if self._compared:
            return
        self._compared = True
        names = _left_out(self._target, place(self._target, delta.manifest, shards=self._shards))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            _LOGGER.warning("%s: has no %s%s, so the model keeps its own", delta.path, names[0], more)

    def _here(self, file: UpdateFile) -> Path:
        """The file on this rank: the files are listed by the first rank, whose folder may have another path."""
        return self.folder / file.path.name

    def _know_state(self, files: list[UpdateFile]) -> None:
        """Find the model's state if it is not known: at first, and after an update that did not end."""
        if self._writes:
            self._state = self.step = None
            self._writes = False
        if self._state is None and files:
            self._find_state(files)

    def _has_moved(self, files: list[UpdateFile]) -> bool:
        """Whether the model is in another state of the chain than the known one: other code may apply updates too."""
        before = self._state
        self._find_state(files)
        return self._state != before

    def _find_state(self, files: list[UpdateFile]) -> None:
        """Find the model's state in the chain by the digests of its tensors, the newest first. Else it is kept."""
        digests: dict[str, str] = {}
        for file in reversed(files):
            if self._is_at(file, digests):
                self._state, self.step = file.result, file.step
                return
        first = next((file for file in files if not file.is_anchor), None)
        if first is not None and self._is_at(first, digests, before=True):
            self._state, self.step = first.base, first.step - 1

    def _is_at(self, file: UpdateFile, digests: dict[str, str], *, before: bool = False) -> bool:
        """Whether every tensor of the model equals the result (or, with `before`, the base) of a file."""
        pieces = in_pieces(self._target, self._shards)
        try:
            with together(self._group, sharded=pieces):
                with DeltaFile(self._here(file)) as delta:
                    manifest = delta.manifest
                if delta.content_id != file.content_id:  # ranks that read different files would wait for each other
                    raise LiveModelError(f"{file.path}: was replaced after the folder was listed")
                placement = place(self._target, manifest, shards=self._shards)
        except (PxdError, LiveModelError, OSError):
            return False
        for turn, entry in enumerate(manifest.modules):
            base = None if entry.base is None else entry.base.sha256
            wanted = base if before or entry.encoding is Encoding.SAME else entry.result or entry.sha256
            if entry.name not in digests and pieces:
                digests[entry.name] = sharded_digest(entry, placement[entry.name][0], turn, self._group)
            elif entry.name not in digests:
                view = placement[entry.name][0].view.detach().cpu().contiguous()
                digests[entry.name] = digest_of(storage_array(view))
            if digests[entry.name] != wanted:
                return False
        return True


def _left_out(target: Target, placement: Placement) -> list[str]:
    """The parameters of a model, or the tensors of a mapping, that no module is placed in, by name."""
    live = dict(target.named_parameters()) if isinstance(target, nn.Module) else target
    held = {_storage(shard.live) for placed in placement.values() for shard in placed}
    return [name for name, tensor in live.items() if tensor.numel() and _storage(tensor) not in held]


def _storage(tensor: Tensor) -> tuple[object, int]:
    piece = own_piece(tensor)
    return piece.device, piece.untyped_storage().data_ptr()
