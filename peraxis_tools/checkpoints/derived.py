"""A checkpoint whose tensors are computed when they are read: a state after updates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable

import peraxis_format as pxd

__all__ = ["DerivedCheckpoint"]


class DerivedCheckpoint(pxd.Safetensors):
    """Tensors computed from those of `before`. The caller closes their sources; `close` does nothing.

    infos: the tensors, in name order. A subclass computes one in `_whole`.
    """

    def __init__(self, before: pxd.Safetensors, infos: Iterable[pxd.TensorInfo], *, label: str) -> None:
        self.label = label
        self.files = before.files
        self.ignored = before.ignored
        self._descriptors = {}
        self._stamps = {}
        self._read_from = before
        self._tensors = {info.name: info for info in infos}
        self._foreign = {name: info for name, info in before._foreign.items() if name not in self._tensors}

    @abstractmethod
    def _whole(self, name: str) -> pxd.Array:
        """A tensor as a storage array. Raises KeyError, PxdError, ToolError."""

    def read(self, name: str, rows: slice | None = None) -> pxd.Array:
        """A tensor, or rows of it. Raises KeyError, PxdError, ToolError."""
        info = self._tensors[name]
        array = self._whole(name)
        if rows is None:
            return array
        start, stop, _ = rows.indices(info.shape[0])
        first = info.dtype.first_rows(array, info.shape, max(start, stop))
        return info.dtype.rows_from(first, info.shape, start)

    def sha256(self, name: str, *, progress: Callable[[int], None] | None = None) -> str:
        """The hex digest of a tensor in this state."""
        array = self.read(name)
        if progress is not None:
            progress(array.nbytes)
        return pxd.digest_of(array)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file that the tensors are computed from was written meanwhile."""
        self._read_from.check_unchanged()

    def close(self) -> None:
        """Do nothing, because the caller closes the sources of the tensors."""
