"""VariantSwitch(base="undo"): variants in place, without a second copy of the base.

    forward     W  ->  W' = round(W + components)
    back        W' ->  round(W' - components)  ->  W        the last arrow is the log: an exact update (SPEC 5.6)

Subtracting the delta restores most weights; rounding has lost bits of the others. The log of a variant has these
exceptions in the encoding `exact`, in host memory. It is written at the first use of the variant and then kept, because
it depends only on base and variant.

Weights are changed one range of rows at a time. The ranges that are a variant's are recorded, and the old bits of a
range are held while it is written, so that a swap can be reverted wherever it fails.

Rejected: the exact difference of variant and base as the log. For one mask with scales of 1% of the weights' spread it
has 28% of the weights' bytes (written for size); the exceptions to subtraction have 0.8% (written for speed 1.3%).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peraxis_format.delta import ComponentFactors
from peraxis_format.dtypes import Array, DType
from peraxis_format.errors import LiveModelError, PxdError
from peraxis_format.ops.exact import BLOCK, apply, encode
from peraxis_format.ops.exact.torch import moved
from peraxis_format.ops.rebuild import rebuild_tensor
from peraxis_format.ops.rebuild.torch import ComponentTensors
from peraxis_format.ops.tensors import as_bytes, from_storage, storage_array
from peraxis_format.thread_pool import ThreadPool
from peraxis_format.torch.device import current_device
from peraxis_format.torch.modes import writes
from peraxis_format.torch.place.proof import block_ranges
from peraxis_format.torch.place.sharded_exact import ExactPiece
from peraxis_format.torch.place.shards import ShardView
from peraxis_format.torch.swap.payload import Payload
from peraxis_format.torch.swap.transfer_plan import ModuleSlice, piece

__all__ = ["InPlace", "UndoLog"]

_STRETCH: Final = 16 * BLOCK  # weights to stage at a time, for each thread


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Stretch:
    """A range of one module in one live storage, with components, the new weights (`full`), an exact update of them
    (the arguments of ops.exact.torch.moved), or a piece of a sharded one.

    flat: `at` is an index into the flat tensor.
    """

    name: str
    shard: ShardView
    at: tuple[int | slice, ...]
    dtype: DType
    components: tuple[ComponentFactors, ...] = ()
    full: Array | None = None
    update: Mapping[str, Any] | None = None
    piece: ExactPiece | None = None
    flat: bool = False

    @property
    def live(self) -> Tensor:
        """The model's weights."""
        return self.of(self.shard.view.detach())

    def of(self, tensor: Tensor) -> Tensor:
        """This range of a tensor of the shard's shape."""
        return (tensor.reshape(-1) if self.flat else tensor)[self.at]

    def forward(self, base: Tensor) -> Tensor:
        """The variant's weights (SPEC 6)."""
        if self.full is not None:
            return from_storage(self.full.copy(), self.dtype).to(base.device)
        if self.update is not None:
            return moved(base, **self.update)
        if self.piece is not None:
            return self.piece.on(base)
        return self._added(base, sign=1)

    def back(self, new: Tensor) -> Tensor:
        """The result of subtracting: the base except for exceptions. It has the same bits each time."""
        return self._added(new, sign=-1) if self.components else new

    def _added(self, weights: Tensor, *, sign: int) -> Tensor:
        terms = [ComponentTensors.of(component, weights.device) for component in self.components]
        signed = [ComponentTensors(term.mask, term.row * sign, term.col, term.plain) for term in terms]
        return rebuild_tensor(weights, signed)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Entry:
    """The log of one range. index, data: an exact update; without an index, data are the base's weights.

    checksum: that of the base's weights.
    """

    index: NDArray[np.uint32] | None
    data: Array
    checksum: int

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.data.nbytes + (0 if self.index is None else self.index.nbytes)


class UndoLog:
    """The log that reverts one variant to the base: its ranges and, after its first use, their exceptions."""

    def __init__(self, payload: Payload) -> None:
        """payload: one with residency "pinned"; its bytes are shared, not copied."""
        self.stretches = tuple(_stretches(payload))
        self.entries: dict[int, _Entry] = {}

    @property
    def size(self) -> int:
        """The bytes of the exceptions."""
        return sum(entry.size for entry in self.entries.values())


class InPlace:
    """The live weights of one switch: the base's or a variant's (that of the current log); mixed after an error."""

    def __init__(self, workers: ThreadPool) -> None:
        self._workers = workers
        self._log: UndoLog | None = None
        self._applied: set[int] = set()  # the ranges that are the variant's
        self._open: dict[int, tuple[Tensor, bool]] = {}  # being written: the old weights, and whether applied before

    @writes()
    def write(self, target: UndoLog | None) -> int:
        """Change the weights to a variant, or to the base (None), from any state. Returns the bytes written.

        Raises LiveModelError if other code has changed the weights. It may then be called again, for the previous
        variant or for the base.
        """
        written = self._settle()
        try:
            if self._log is not target:
                written += self._each(self._back, sorted(self._applied))
                self._log = target
            if target is not None:
                written += self._each(
                    self._forward, [i for i in range(len(target.stretches)) if i not in self._applied]
                )
        finally:
            self._publish()
        return written

    def base_of(self, shard: ShardView) -> Tensor:
        """The base's weights of a shard: a contiguous copy. No swap may run meanwhile."""
        base = _copy(shard.view.detach())
        if self._log is not None:
            for i in self._applied:
                stretch = self._log.stretches[i]
                if stretch.shard is shard:
                    stretch.of(base).copy_(_taken_back(stretch, self._log.entries[i], _copy(stretch.live)))
        return base

    def changed(self) -> frozenset[ShardView]:
        """The storages that the variant changes."""
        return frozenset(stretch.shard for stretch in self._stretches())

    def _stretches(self) -> tuple[_Stretch, ...]:
        return () if self._log is None else self._log.stretches

    def _each(self, job: Callable[[UndoLog, int], None], numbers: Iterable[int]) -> int:
        log, chosen = self._log, list(numbers)
        if log is None:
            return 0
        self._workers.run(partial(_on_device, log.stretches[i].shard, partial(job, log, i)) for i in chosen)
        for shard in {log.stretches[i].shard for i in chosen}:
            shard.publish()
        return sum(log.stretches[i].live.nbytes for i in chosen)

    def _forward(self, log: UndoLog, i: int) -> None:
        stretch, entry = log.stretches[i], log.entries.get(i)
        base = _copy(stretch.live)
        if entry is not None and _checksum(base) != entry.checksum:
            raise _foreign(stretch)
        new = stretch.forward(base)
        if entry is None:
            log.entries[i] = _logged(stretch, base, new)
        self._put(stretch, i, old=base, new=new, applied=True)

    def _back(self, log: UndoLog, i: int) -> None:
        stretch, entry = log.stretches[i], log.entries[i]
        new = _copy(stretch.live)
        try:
            base = _taken_back(stretch, entry, new)
        except PxdError:
            raise _foreign(stretch) from None
        if _checksum(base) != entry.checksum:
            raise _foreign(stretch)
        self._put(stretch, i, old=new, new=base, applied=False)

    def _put(self, stretch: _Stretch, i: int, *, old: Tensor, new: Tensor, applied: bool) -> None:
        self._open[i] = old, not applied
        stretch.live.copy_(new)
        self._count(i, applied=applied)
        del self._open[i]

    def _count(self, i: int, *, applied: bool) -> None:
        if applied:
            self._applied.add(i)
        else:
            self._applied.discard(i)

    def _settle(self) -> int:
        """Restore ranges that an error has left partly written."""
        written = 0
        stretches = self._stretches()
        for i, (old, applied) in list(self._open.items()):
            stretches[i].live.copy_(old)
            self._count(i, applied=applied)
            del self._open[i]
            written += old.nbytes
        return written

    def _publish(self) -> None:
        for shard in self.changed():
            shard.publish()


def _on_device(shard: ShardView, job: Callable[[], None]) -> None:
    """Run a job on the shard's device, because threads have another current device."""
    with writes(), current_device(shard.view.device):
        job()


def _copy(weights: Tensor) -> Tensor:
    return weights.clone(memory_format=torch.contiguous_format)


def _checksum(weights: Tensor) -> int:
    """A sum over all bytes, at the speed of memory; it detects weights that other code has written."""
    data = as_bytes(weights)
    whole = data.numel() // 8 * 8
    return int(data[:whole].view(torch.int64).sum()) ^ int(data[whole:].sum()) << 64


def _logged(stretch: _Stretch, base: Tensor, new: Tensor) -> _Entry:
    wanted = storage_array(base.cpu())
    if not stretch.dtype.is_float:
        return _Entry(index=None, data=wanted.copy(), checksum=_checksum(base))
    index, data = encode(storage_array(stretch.back(new).cpu()), wanted, stretch.dtype, prefer="speed", threads=1)
    return _Entry(index=index, data=data, checksum=_checksum(base))


def _taken_back(stretch: _Stretch, entry: _Entry, new: Tensor) -> Tensor:
    if entry.index is None:
        return from_storage(entry.data.copy(), stretch.dtype).to(new.device)
    near = stretch.back(new)
    if near.is_cuda:
        return moved(near, entry.index, entry.data, stretch.dtype)
    base = near.clone() if near is new else near
    apply(storage_array(base), entry.index, entry.data, stretch.dtype, threads=1)
    return base


def _foreign(stretch: _Stretch) -> LiveModelError:
    return LiveModelError(
        f"{stretch.name}: was written by other code since the last swap, so it cannot be reverted; "
        "load the base again and make a new VariantSwitch"
    )


def _stretches(payload: Payload) -> Iterator[_Stretch]:
    for index, transfer in enumerate(payload.transfers):
        buffer = storage_array(payload.host(index))
        for slice_ in transfer.modules:
            for shard in slice_.views:
                yield from _of_module(slice_, buffer, shard)
    for found in payload.pieces:
        yield _Stretch(name=found.name, shard=found.shard, at=(), dtype=found.dtype, piece=found)


def _of_module(slice_: ModuleSlice, buffer: Array, shard: ShardView) -> Iterator[_Stretch]:
    module, shape, name = piece(slice_, buffer), slice_.shape, slice_.entry.name
    if module.full is not None:
        if not shape:
            yield _Stretch(name=name, shard=shard, at=(), dtype=module.dtype, full=module.full)
        for rows in _row_ranges(shape) if shape else ():
            yield _Stretch(name=name, shard=shard, at=(rows,), dtype=module.dtype, full=module.full[rows])
        return
    if module.index is not None:
        flat = shard.view.is_contiguous()
        for weights, update in block_ranges(module, _STRETCH // BLOCK or 1 if flat else module.index.size):
            at = (weights,) if flat else ()
            yield _Stretch(name=name, shard=shard, at=at, dtype=module.dtype, update=update, flat=flat)
        return
    for batch, components in zip(np.ndindex(shape[:-2]), module.factors(), strict=True):
        for rows in _row_ranges(shape[-2:]):
            cut = tuple(component.part(rows) for component in components)
            yield _Stretch(name=name, shard=shard, at=(*batch, rows), dtype=module.dtype, components=cut)


def _row_ranges(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, _STRETCH // max(1, math.prod(shape[1:])))
    return (slice(begin, min(begin + step, shape[0])) for begin in range(0, shape[0], step))
