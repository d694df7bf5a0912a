"""The change of one tensor, for all wires: the weights, and their new patterns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_tools.errors import CheckFailedError, ToolError

__all__ = ["TensorChange", "WireFile", "changed", "changed_words", "checked_index", "words_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChange:
    """index: int64 [k], flat, in row-major order and ascending; None for all weights. words: unsigned, of the tensor's
    width, [k] or [n]: new patterns, or with is_xor the XOR of old and new ones.
    """

    index: NDArray[np.int64] | None
    words: pxd.Array
    is_xor: bool


class WireFile(Protocol):
    """One opened wire."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the changed tensors."""

    def change(self, name: str, info: pxd.TensorInfo) -> TensorChange:
        """The change of one tensor; info: the tensor before. Raises ToolError, CheckFailedError."""

    def check(self, name: str, new: pxd.Array) -> None:
        """Check a new tensor by the wire's checksum, if it has one. Raises CheckFailedError."""

    def close(self) -> None:
        """Close its files."""


def words_of(array: pxd.Array) -> pxd.Array:
    """A storage array as flat unsigned words, sharing memory."""
    flat: pxd.Array = np.ascontiguousarray(array).reshape(-1)
    return flat.view(f"<u{flat.dtype.itemsize}")


def changed_words(old: pxd.Array, new: pxd.Array) -> tuple[NDArray[np.int64], pxd.Array]:
    """The flat indices of the weights that differ, and XOR of old and new there."""
    before, after = words_of(old), words_of(new)
    index = np.flatnonzero(before != after).astype(np.int64)
    return index, before[index] ^ after[index]


def changed(old: pxd.Array, change: TensorChange) -> pxd.Array:
    """The tensor after a change, as a new storage array."""
    new = old.copy()
    words = words_of(new) if new.size else new.reshape(-1).view(f"<u{new.dtype.itemsize}")
    if change.index is None:
        words[...] = words ^ change.words if change.is_xor else change.words
    else:
        words[change.index] = words[change.index] ^ change.words if change.is_xor else change.words
    return words.view(old.dtype).reshape(old.shape)


def checked_index(where: str, index: NDArray[np.int64], weights: int) -> NDArray[np.intp] | None:
    """The order that sorts the indices, None if they are sorted. where: names file and tensor in errors.

    Raises CheckFailedError for an index outside the tensor, ToolError for one that occurs twice.
    """
    wrong = np.flatnonzero((index < 0) | (index >= weights))
    if wrong.size:
        at = int(wrong[0])
        raise CheckFailedError(
            f"{where}: index {int(index[at])} at {at} is outside of the base's {weights} weights; pass the step's base"
        )
    steps = np.diff(index)
    if np.all(steps > 0):
        return None
    order = np.argsort(index, kind="stable")
    twice = np.flatnonzero(np.diff(index[order]) == 0)
    if twice.size:
        at = int(order[twice[0] + 1])
        raise ToolError(f"{where}: index {int(index[at])} at {at} occurs twice; write the wire again")
    return order
