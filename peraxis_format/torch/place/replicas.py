"""Replicated pieces of a sharded model (HSDP): every copy must be the base's, not only the one that is hashed.

Pieces that several ranks have are sent and hashed once. The other ranks hash their copies themselves, at the same time,
and compare digests, so that a copy that differs on one rank is an error on all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from torch import Tensor

from peraxis_format.dtypes import raw_bytes
from peraxis_format.errors import fail
from peraxis_format.ops.tensors import as_bytes, storage_array
from peraxis_format.thread_pool import run_jobs
from peraxis_format.torch.device import current_device
from peraxis_format.torch.place.ranks import raise_first, sendable
from peraxis_format.torch.place.shards import Box, ShardView

__all__ = ["OddReplica", "check_replicas", "odd_replica"]

_PIECE: Final = 64 << 20  # bytes to copy to the host at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class OddReplica:
    """A rank whose copy of a piece differs from that of another rank."""

    name: str
    rank: int
    other: int


def check_replicas(
    placed: Mapping[str, ShardView], boxes: Sequence[Mapping[str, Box]], gather: Callable[[Any], list[Any]]
) -> None:
    """Raise BindingError (E404), on all ranks, if copies of a piece differ. Arguments: see odd_replica."""
    odd = odd_replica(placed, boxes, gather)
    if odd is not None:
        detail = f"rank {odd.rank} has other weights than rank {odd.other}, which has the same piece; load it again"
        fail("E404", detail, field=odd.name)  # SPEC 7.3


def odd_replica(
    placed: Mapping[str, ShardView], boxes: Sequence[Mapping[str, Box]], gather: Callable[[Any], list[Any]]
) -> OddReplica | None:
    """The first copy of a piece that differs from the first rank's. Collective, with one result on all ranks.

    placed: this rank's pieces by name, equal names on all ranks. boxes: those of every rank. gather: the values of all
    ranks, in rank order.
    """
    digests: dict[str, str] = {}
    jobs = [
        partial(_hash, name, shard.view.detach(), digests)
        for name, shard in placed.items()
        if shard.view.numel() and sum(each[name] == shard.box for each in boxes) > 1
    ]
    failure: BaseException | None = None
    try:
        run_jobs(jobs)
    except BaseException as error:
        failure = error
    found = gather(digests if failure is None else sendable(failure))
    raise_first(found, failure)
    for name in placed:
        first: dict[Box, int] = {}
        for rank, each in enumerate(found):
            if name not in each:
                continue
            other = first.setdefault(boxes[rank][name], rank)
            if each[name] != found[other][name]:
                return OddReplica(name=name, rank=rank, other=other)
    return None


def _hash(name: str, view: Tensor, digests: dict[str, str]) -> None:
    hasher = hashlib.sha256()
    with current_device(view.device):
        data = as_bytes(view)
        for begin in range(0, len(data), _PIECE):
            hasher.update(raw_bytes(storage_array(data[begin : begin + _PIECE].cpu())))
    digests[name] = hasher.hexdigest()
