"""Write a checked update to an unsharded model; a write that fails is finished, not left half done.

The old weights are gone once they are written, and a copy of them would take the memory of the changes. So a failed
write is not reverted but finished: the place is noted, and the range that was being written is kept until it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peraxis_format.delta import ModuleDelta
from peraxis_format.dtypes import Array
from peraxis_format.errors import torn
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.modes import writes
from peraxis_format.torch.place.proof import stretches
from peraxis_format.torch.place.shards import Placement, ShardView, storage_key

__all__ = ["write_whole"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _At:
    """The place of a write. job, ranges: the storages, and the ranges of the next one, that are written. pending: the
    range that is being written, and its new weights; the old ones, which they were decoded from, may be gone.
    """

    job: int = 0
    ranges: int = 0
    pending: tuple[Tensor, Tensor] | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class _Write:
    """A write that can go on after a failure: each step is noted in one assignment."""

    jobs: list[tuple[ShardView, ModuleDelta]]
    at: _At = field(default_factory=_At)

    def run(self) -> None:
        """Write the rest."""
        while self.at.job < len(self.jobs):
            shard, module = self.jobs[self.at.job]
            self._put()
            for live, new in _ranges(shard.view, module, done=self.at.ranges):
                self.at = _At(job=self.at.job, ranges=self.at.ranges, pending=(live, new))
                self._put()
            shard.publish()
            self.at = _At(job=self.at.job + 1)

    def _put(self) -> None:
        if self.at.pending is not None:
            live, new = self.at.pending
            with writes():
                live.copy_(new)
            self.at = _At(job=self.at.job, ranges=self.at.ranges + 1)


def write_whole(file: DeltaFile, modules: list[ModuleDelta], placement: Placement) -> None:
    """Write modules that were checked against these weights. Each storage is written once.

    The caller defers signals (interrupts.py), so that no second one ends the write. An interrupt is raised after the
    last weight. Raises TornError if a failed write could not be finished either.
    """
    write = _Write(jobs=list(_jobs(modules, placement)))
    try:
        write.run()
    except BaseException as error:
        try:
            write.run()
        except BaseException as again:
            raise torn(f"{file.path}:", error, again, undone="finished") from again
        if not isinstance(error, Exception):
            raise


def _jobs(modules: list[ModuleDelta], placement: Placement) -> Iterator[tuple[ShardView, ModuleDelta]]:
    written = set()  # equal tensors of the file may share storage in the model, and an update decodes once
    for module in modules:
        for shard in placement[module.name]:
            key = storage_key(shard.live)
            if key not in written:
                written.add(key)
                yield shard, module


def _ranges(view: Tensor, module: ModuleDelta, *, done: int) -> Iterator[tuple[Tensor, Tensor]]:
    if module.full is None:
        yield from stretches(view, module, done=done)
    elif not done:
        yield view, _tensor(module.full.copy(), view)


def _tensor(array: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(array.reshape(-1).view("u1")).view(like.dtype).reshape(like.shape)
