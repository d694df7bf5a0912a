"""The processes that share a model: each sends values to one of them or to all, and errors reach all.

Everything here is collective: every rank of the group calls it in the same order. Without torch.distributed there is
one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import distributed

__all__ = ["Ranks", "agree", "is_distributed"]


def is_distributed() -> bool:
    """Whether this process belongs to a group of torch.distributed."""
    return distributed.is_available() and distributed.is_initialized()


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of a group (None: all), and the rank of this process."""

    group: Any = None

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return distributed.get_rank(self.group) if is_distributed() else 0

    @property
    def count(self) -> int:
        """The number of ranks."""
        return distributed.get_world_size(self.group) if is_distributed() else 1

    def world(self, rank: int) -> int:
        """The global rank of a rank of the group."""
        return rank if self.group is None else distributed.get_global_rank(self.group, rank)

    def all_gather(self, value: Any) -> list[Any]:
        """The value of each rank, on every rank."""
        if self.count == 1:
            return [value]
        out: list[Any] = [None] * self.count
        distributed.all_gather_object(out, value, group=self.group)
        return out

    def gather(self, value: Any, *, on: int) -> list[Any]:
        """The value of each rank, on one rank; an empty list on the others."""
        out: list[Any] | None = [None] * self.count if self.rank == on else None
        distributed.gather_object(value, out, dst=self.world(on), group=self.group)
        return out or []

    def all_to_all(self, outgoing: Sequence[Any]) -> list[Any]:
        """Send one value to each rank. Returns the values that all ranks sent to this one, in rank order."""
        incoming: list[Any] = []
        for rank in range(self.count):
            found = self.gather(outgoing[rank], on=rank)
            if rank == self.rank:
                incoming = found
        return incoming

    def broadcast(self, value: Any, *, rank: int) -> Any:
        """One rank's value, on every rank."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=self.world(rank), group=self.group)
        return box[0]


def agree(error: BaseException | None, group: Any = None) -> None:
    """Raise on every rank if one rank has an error: the rank's own error, else that of the first other rank."""
    failures = [failure for failure in Ranks(group).all_gather(error) if failure is not None]
    if error is not None:
        raise error
    if failures:
        raise failures[0]
