"""apply_: turn a live model into the fine-tune, in place and atomically.

    place -> check the base's bytes -> (sharded: ranks divide the digests) -> copy the old weights -> stream

Every byte is checked before use (SPEC 8, steps 9 to 12). On any error, on any rank, the old weights are restored. They
cannot be computed from the new ones, because rounding has lost bits. So a copy of all of them is kept until the last
weight is written, on the device or in host memory. VariantSwitch keeps such a copy until it is closed.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor

from peraxis_format.arguments import check_choice, check_least, kind_of
from peraxis_format.errors import BindingError, LiveModelError, located, torn
from peraxis_format.interrupts import uninterrupted
from peraxis_format.reader import DeltaFile
from peraxis_format.thread_pool import ThreadPool
from peraxis_format.torch.device import Device, device_of
from peraxis_format.torch.modes import allocates, writes
from peraxis_format.torch.place.binding import check_live, is_sharded, sharded_anywhere
from peraxis_format.torch.place.claims import writing
from peraxis_format.torch.place.placement import place
from peraxis_format.torch.place.ranks import Ranks, is_distributed, together
from peraxis_format.torch.place.sharded_exact import ExactPiece, exact_pieces
from peraxis_format.torch.place.shards import Placement, Shard, ShardView, Target, Views, copy_aside, increment_versions
from peraxis_format.torch.ring import Ring
from peraxis_format.torch.swap.engine import engine_for
from peraxis_format.torch.swap.payload import Payload
from peraxis_format.torch.swap.stream import stream
from peraxis_format.torch.swap.transfer_plan import TRANSFER_LIMIT, Transfer, cut_transfers

__all__ = ["Applied", "apply_", "verify_share"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """The result of apply_. read_bytes: bytes of the file that were used; uploads: copies from host to device."""

    content_id: str
    modules: int
    read_bytes: int
    verified_bytes: int
    uploads: int
    seconds: float


# The content ID of the delta that was last applied to a model.
_LAST: Final[weakref.WeakKeyDictionary[torch.nn.Module, str]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _applied_already(target: Target, content_id: str) -> Iterator[None]:
    """Add a remedy to the BindingError of a model to which this delta was applied before."""
    try:
        yield
    except BindingError as error:
        if isinstance(target, torch.nn.Module) and _LAST.get(target) == content_id:
            error.advice = "this delta was applied to this model before; it is not applied twice"
        raise


@allocates()
def apply_(
    target: Target,
    delta: DeltaFile | str | os.PathLike[str],
    *,
    views: Views | None = None,
    shards: Mapping[str, Shard] | None = None,
    group: Any = None,
    workers: int | None = None,
    undo: Literal["device", "host"] = "device",
) -> Applied:
    """Turn a live model with the base's weights into the fine-tune, in place, bit for bit (SPEC 6).

    target: a module, or a mapping of checkpoint names to tensors; on the CPU or on one CUDA device. views: the live
    tensors of checkpoint names that cannot be found by name. shards: the pieces that plain local tensors are, by
    checkpoint name. group: the torch.distributed group whose ranks have the shards. workers: the number of threads.
    undo: the place of the old weights' copy until all weights are written.
    Raises PxdError (a damaged file, another base) and LiveModelError (weights that cannot become the fine-tune); the
    model is then unchanged. Existing storage is written, so parameters and pointers stay valid. Ctrl-C waits for the
    end of the writes. Raises TornError if a failed write could not be reverted.
    """
    if not isinstance(delta, DeltaFile | str | os.PathLike):
        swapped = isinstance(target, DeltaFile | str | os.PathLike)
        remedy = "pass them in the other order, apply_(model, delta)" if swapped else "pass a path or an open delta"
        raise LiveModelError(f"the delta is {kind_of(delta)}; {remedy}")
    check_choice("undo", undo, ("device", "host"), error=LiveModelError)
    check_least("workers", workers, 1, error=LiveModelError)
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPool(workers))
        # Each step is collective: a rank that fails must not leave the others in the next one.
        with together(group, sharded=is_distributed()):
            opened = _open(stack, target, delta, views=views, shards=shards)
        file, placement, device = opened.file, opened.placement, opened.device
        with located(file.path), _applied_already(target, file.content_id):
            check_live(file.manifest, placement, ring=opened.ring, workers=pool.count, group=group)
        sharded = sharded_anywhere(here=is_sharded(placement, file.manifest), group=group)
        with together(group, sharded=sharded):
            verified = verify_share(file, group, pool) if sharded else 0
        pieces = exact_pieces(file, placement, base_of=_view, group=group) if sharded else ()
        with together(group, sharded=sharded):
            payload = opened.payload(pieces, pool)
        before = device.counters.uploads
        with together(group, sharded=sharded):
            kept, bases = _copies(placement, undo)

        def write() -> None:
            engine = engine_for(opened.transfers, bases, device=device, workers=pool)
            stream(payload, engine, device=device, ring=opened.ring, workers=pool)

        _all_or_none(write, kept, group=group, sharded=sharded)
        if isinstance(target, torch.nn.Module):
            _LAST[target] = file.content_id
        return Applied(
            content_id=file.content_id,
            modules=len(file),
            read_bytes=payload.bytes_read,
            verified_bytes=verified or payload.bytes_read,
            uploads=device.counters.uploads - before,
            seconds=time.perf_counter() - started,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Opened:
    """A delta, the places of its tensors in the live model, and what moves them there."""

    file: DeltaFile
    placement: Placement
    device: Device
    transfers: tuple[Transfer, ...]
    ring: Ring

    def payload(self, pieces: tuple[ExactPiece, ...], pool: ThreadPool) -> Payload:
        """The payload in pinned memory. pieces: the exact tensors of a sharded model."""
        return Payload(
            self.file,
            self.transfers,
            residency="pinned",
            device=self.device,
            ring=self.ring,
            workers=pool,
            base_of=_view,
            pieces=pieces,
        )


def _open(
    stack: contextlib.ExitStack,
    target: Target,
    delta: DeltaFile | str | os.PathLike[str],
    *,
    views: Views | None,
    shards: Mapping[str, Shard] | None,
) -> _Opened:
    """Open a delta and place its tensors; `stack` closes the file and gives the live tensors back. Not collective."""
    file = delta if isinstance(delta, DeltaFile) else stack.enter_context(DeltaFile(delta))
    placement = place(target, file.manifest, views=views, shards=shards)
    stack.enter_context(writing(shard.live for placed in placement.values() for shard in placed))
    device = device_of(placement)
    transfers = cut_transfers(file, placement, limit=TRANSFER_LIMIT)
    ring = Ring(device)
    ring.reserve(max((transfer.size for transfer in transfers), default=0))
    return _Opened(file=file, placement=placement, device=device, transfers=transfers, ring=ring)


def _view(shard: ShardView) -> Tensor:
    return shard.view


def _copies(
    placement: Placement, where: Literal["device", "host"]
) -> tuple[dict[ShardView, Tensor], dict[ShardView, Tensor]]:
    """Copies of the live weights, and the bases to rebuild from: these, or (copies on the host) the weights themselves.

    In place, because each weight is read before it is written. Strided ones are rebuilt in another buffer.
    """
    kept = copy_aside(placement, host=where == "host")
    if where == "device":
        return kept, kept
    return kept, {
        shard: shard.view if shard.view.is_contiguous() else old.to(shard.view.device) for shard, old in kept.items()
    }


def _all_or_none(write: Callable[[], None], kept: Mapping[ShardView, Tensor], *, group: Any, sharded: bool) -> None:
    """Write the weights; on any error, on any rank, restore the kept ones. No signal comes in between.

    Raises the error, or TornError if a weight could not be restored; the others are.
    """
    with uninterrupted():
        try:
            with together(group, sharded=sharded), writes():
                write()
        except BaseException as error:
            with together(group, sharded=sharded):
                _restore(kept, error)
            raise
        finally:
            increment_versions(kept)


def _restore(kept: Mapping[ShardView, Tensor], error: BaseException) -> None:
    failure: BaseException | None = None
    for shard, old in kept.items():
        try:
            with writes():
                shard.view.copy_(old)
            shard.publish()
        except BaseException as again:
            failure = failure or again
    if failure is not None:
        raise torn("a delta", error, failure) from failure


def verify_share(delta: DeltaFile, group: Any, workers: ThreadPool) -> int:
    """Steps 9 to 11 for this rank's share of the modules; of n ranks each takes every n-th one. Returns its bytes.

    A rank that reads only a slice of a module cannot check its digest, so all ranks together check the whole file.
    """
    ranks = Ranks(group)
    names = [entry.name for entry in delta.manifest.modules if entry.sha256 is not None][ranks.rank :: ranks.count]
    workers.run(partial(delta.load, name) for name in names)
    return sum(map(delta.payload_bytes, names))
