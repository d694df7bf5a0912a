"""apply_: turn a live model into the fine-tune, in place, as a whole or not at all.

    place -> check the base's bytes -> (sharded: ranks share out the digests) -> copy the old weights aside -> stream

Every byte that is used is checked first (SPEC 8, step 9 to 12). On any error, on any rank, the old weights are put
back. They cannot be computed back: rounding has lost bits of them. So all of them are kept until the last is written,
beside the model or in host memory. VariantSwitch keeps such a copy for good, and so can go on to other variants.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from peraxis_format.reader import DeltaFile
from peraxis_format.thread_pool import ThreadPool
from peraxis_format.torch.device import device_of
from peraxis_format.torch.place.binding import agree, check_live, is_sharded, rank_and_count, sharded_anywhere
from peraxis_format.torch.place.claims import refuse_claimed
from peraxis_format.torch.place.placement import place
from peraxis_format.torch.place.shards import Placement, Shard, ShardView, Target, Views, copy_aside, increment_versions
from peraxis_format.torch.ring import Ring
from peraxis_format.torch.swap.engine import engine_for
from peraxis_format.torch.swap.payload import Payload
from peraxis_format.torch.swap.stream import stream
from peraxis_format.torch.swap.transfer_plan import TRANSFER_LIMIT, cut_transfers

__all__ = ["Applied", "apply_", "together", "verify_share"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """The result of apply_. read_bytes: bytes of the file that were used; uploads: copies from host to device."""

    content_id: str
    modules: int
    read_bytes: int
    verified_bytes: int
    uploads: int
    seconds: float


@torch.no_grad()
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
    """Turn a live model that holds the base into the fine-tune, in place, bit for bit as SPEC 6 says.

    target: a module, or a mapping of checkpoint names to tensors; on the CPU or on one CUDA device. views, shards: see
    placement.place. group: the torch.distributed group whose ranks hold the shards. workers: the number of threads.
    undo: where the old weights are kept until all weights are written.
    Raises PxdError (a damaged file, another base) and LiveModelError (weights that cannot hold the fine-tune); the
    model is then as it was. Existing storage is written, so that parameters and pointers stay valid.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        file = delta if isinstance(delta, DeltaFile) else stack.enter_context(DeltaFile(delta))
        pool = stack.enter_context(ThreadPool(workers))
        placement = place(target, file.manifest, views=views, shards=shards)
        refuse_claimed(part.live for parts in placement.values() for part in parts)
        device = device_of(placement)
        transfers = cut_transfers(file, placement, limit=TRANSFER_LIMIT)
        ring = Ring(device)
        ring.reserve(max((transfer.size for transfer in transfers), default=0))
        check_live(file.manifest, placement, ring=ring, workers=pool.count, group=group)
        sharded = sharded_anywhere(here=is_sharded(placement, file.manifest), group=group)
        with together(group, sharded=sharded):
            verified = verify_share(file, group, pool) if sharded else 0
            payload = Payload(file, transfers, residency="pinned", device=device, ring=ring, workers=pool)
        before = device.counters.uploads
        with _undo(placement, undo) as bases, together(group, sharded=sharded):
            engine = engine_for(transfers, bases, device=device, workers=pool)
            stream(payload, engine, device=device, ring=ring, workers=pool)
        increment_versions(part for parts in placement.values() for part in parts)
        return Applied(
            content_id=file.content_id,
            modules=len(file),
            read_bytes=payload.bytes_read,
            verified_bytes=verified or payload.bytes_read,
            uploads=device.counters.uploads - before,
            seconds=time.perf_counter() - started,
        )


@contextlib.contextmanager
def together(group: Any, *, sharded: bool) -> Iterator[None]:
    """If ranks share a model, end the block with success on all of them or with an error on all of them."""
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    if sharded:
        agree(failure, group)
    elif failure is not None:
        raise failure


@contextlib.contextmanager
def _undo(placement: Placement, where: Literal["device", "host"]) -> Iterator[dict[ShardView, Tensor]]:
    """The bases to rebuild from: copies of the live weights or, with copies in host memory, the weights themselves.

    The copies are put back where the block ends in an error.
    """
    kept = copy_aside(placement, host=where == "host")
    bases = kept
    if where == "host":
        # In place: each weight is read before it is written. Strided ones are rebuilt beside their storage.
        bases = {
            part: part.view if part.view.is_contiguous() else old.to(part.view.device) for part, old in kept.items()
        }
    try:
        yield bases
    except BaseException:
        for part, old in kept.items():
            part.view.copy_(old)
            part.publish()
        raise


def verify_share(delta: DeltaFile, group: Any, workers: ThreadPool) -> int:
    """Steps 9 to 11 for this rank's share of the modules: each rank takes every n-th one. Returns its bytes.

    A rank that reads only a slice of a module cannot check its digest; all ranks together check the whole file.
    """
    rank, count = rank_and_count(group)
    names = [entry.name for entry in delta.manifest.modules if entry.sha256 is not None][rank::count]
    workers.run(partial(delta.load, name) for name in names)
    return sum(end - begin for begin, end in map(delta.span, names))
