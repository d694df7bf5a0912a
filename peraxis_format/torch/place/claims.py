"""Claims on the weights of a live model: one owner at a time for each storage.

A VariantSwitch keeps a pristine copy of the weights that it changes, and `serve` reads the live ones as the base. Both
would be silently wrong if other code wrote them. So each claims the storages that it relies on. A writer (`apply_`, an
exact update) claims them from its checks to its last write, so that two writers never change weights that both have
checked. A claim ends with its owner, or with the storage.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, UntypedStorage

from peraxis_format.errors import LiveModelError

__all__ = ["claim", "refuse_claimed", "release", "writing"]


@dataclass(frozen=True, slots=True)
class _Claim:
    owner: weakref.ref[Any]
    storage: weakref.ref[Any]
    remedy: str


_CLAIMS: Final[dict[int, _Claim]] = {}  # data_ptr of a storage -> its claim
_LOCK: Final = threading.Lock()
_WRITTEN: Final = "another thread is writing these weights; wait for its end, and apply again"


class _Writer:
    """The owner of the claims of one write."""


def refuse_claimed(views: Iterable[Tensor], owner: Any = None) -> None:
    """Raise LiveModelError if an owner other than `owner` has a claim on one of these storages."""
    with _LOCK:
        _refuse(views, owner)


def _refuse(views: Iterable[Tensor], owner: Any) -> None:
    for storage in _storages(views):
        found = _CLAIMS.get(storage.data_ptr())
        if found is None or found.storage() is None:
            continue
        other = found.owner()
        if other is not None and other is not owner:
            raise LiveModelError(found.remedy)


def _storages(views: Iterable[Tensor]) -> Iterator[UntypedStorage]:
    """The storages that hold a weight; all empty ones have one address."""
    return (storage for view in views if (storage := view.untyped_storage()).nbytes())


def claim(views: Iterable[Tensor], owner: Any, remedy: str) -> None:
    """Claim storages for an owner. remedy: the error message for others. Raises LiveModelError as refuse_claimed."""
    views = list(views)
    with _LOCK:
        _refuse(views, owner)
        for storage in _storages(views):
            _CLAIMS[storage.data_ptr()] = _Claim(weakref.ref(owner), weakref.ref(storage), remedy)


def release(owner: Any) -> None:
    """End all claims of an owner, and those whose owner is gone."""
    with _LOCK:
        for key, found in list(_CLAIMS.items()):
            if found.owner() in (None, owner) or found.storage() is None:
                del _CLAIMS[key]


@contextlib.contextmanager
def writing(views: Iterable[Tensor]) -> Iterator[object]:
    """Claim storages for one write, from its checks to its end; yields the owner. Raises as refuse_claimed."""
    owner = _Writer()
    claim(views, owner, _WRITTEN)
    try:
        yield owner
    finally:
        release(owner)
