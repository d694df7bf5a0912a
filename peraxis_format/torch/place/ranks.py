"""The processes that share a model: each sends values to one of them or to all, and errors reach all.

Everything here is collective: every rank of the group calls it in the same order. Without torch.distributed there is
one rank.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import distributed

from peraxis_format.errors import LiveModelError, PxdError, first_line

__all__ = ["KeptError", "Ranks", "agree", "graver", "is_distributed", "raise_first", "sendable", "together"]


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
        if self.count == 1:
            return [value]
        out: list[Any] | None = [None] * self.count if self.rank == on else None
        distributed.gather_object(value, out, dst=self.world(on), group=self.group)
        return out or []

    def scatter(self, values: Sequence[Any], *, rank: int) -> Any:
        """One of the values of a rank, which has as many as there are ranks, on each rank. values: empty on others."""
        if self.count == 1:
            return values[0]
        box: list[Any] = [None]
        distributed.scatter_object_list(
            box, list(values) if self.rank == rank else None, src=self.world(rank), group=self.group
        )
        return box[0]

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
    """Raise one error on every rank if any rank has one: an interrupt, else one that is no PxdError, else a PxdError.

    Of several of a kind, it is that of the lowest rank. So all ranks handle the same error, and go on in the same way.
    """
    ranks = Ranks(group)
    if ranks.count > 1:
        mine = None if error is None else sendable(error)
        found = ranks.all_gather(mine)
        found[ranks.rank] = mine  # with its traceback
        raise_first(found, error)
    elif error is not None:
        raise error


def raise_first(found: Sequence[object], cause: BaseException | None) -> None:
    """Raise the gravest of the errors among these values of all ranks, the first of equals; see `agree`.

    cause: the error of this rank.
    """
    failed = [each for each in found if isinstance(each, BaseException)]
    if not failed:
        return
    first = min(failed, key=_gravity)
    if first is cause:
        raise first
    raise first from cause


def graver(kept: BaseException | None, new: BaseException | None) -> BaseException | None:
    """The graver of two errors of this rank, the kept one of equals; see `agree`."""
    return new if kept is None or (new is not None and _gravity(new) < _gravity(kept)) else kept


def _gravity(error: BaseException) -> int:
    """Interrupts come first. Wrong bytes come last, because a rank with another error sends others wrong bytes."""
    return 0 if not isinstance(error, Exception) else 2 if isinstance(error, PxdError) else 1


@contextlib.contextmanager
def together(group: Any, *, sharded: bool = True) -> Iterator[None]:
    """If ranks share a model, end the block with success on all of them or with an error on all of them.

    The block must not be collective: a rank that fails in it would leave the others waiting.
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    if sharded:
        agree(failure, group)
    elif failure is not None:
        raise failure


class KeptError:
    """A context that keeps an error of this rank, which goes on because others wait for its pieces.

    error: the gravest, the first of equals (see `agree`). It may be an interrupt.
    """

    error: BaseException | None = None

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.error = graver(self.error, error)
        return True


def sendable(error: BaseException) -> BaseException:
    """The error, or, if it cannot be pickled, one with its message: all ranks must raise the same type.

    An interrupt stays one.
    """
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        if not isinstance(error, Exception):
            return KeyboardInterrupt(first_line(error))
        return LiveModelError(f"{type(error).__name__}: {first_line(error)}")
    return error
