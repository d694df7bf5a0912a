"""A checkpoint that consists of a base and updates on it; it is read and checked tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import peraxis_format as pxd
from peraxis_tools.located import located

__all__ = ["ChainState"]


class ChainState(pxd.Safetensors):
    """The state after some updates, as a checkpoint. The caller closes the base and the updates.

    Reading a tensor reads it from the base once, checks its digest, and applies every update. Raises E404 or E405 if a
    state is not the one that an update was made on.
    """

    def __init__(self, base: pxd.Safetensors, updates: Sequence[pxd.DeltaFile]) -> None:
        self._base = base
        self._updates = tuple(updates)
        self.label = base.label if not updates else f"{base.label} + {len(self._updates)} updates"
        self.files = base.files
        self._known = {info.name: info for info in base.infos()}
        # For each update: the module of each alias.
        self._modules = {id(update): {alias: name for name, alias in update.manifest.tied} for update in self._updates}
        for update in self._updates:
            self._take_over(update)

    def _take_over(self, update: pxd.DeltaFile) -> None:
        pxd.check_base_names(update.manifest, self)
        aliases = {alias: module for module, alias in update.manifest.tied}
        known = {entry.name: _info(entry.name, entry, update.path) for entry in update.manifest.modules}
        known.update({alias: _info(alias, update.entry(module), update.path) for alias, module in aliases.items()})
        self._known = dict(sorted(known.items()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> pxd.TensorInfo:
        return self._known[name]

    def infos(self) -> list[pxd.TensorInfo]:
        """Every tensor, in name order."""
        return list(self._known.values())

    @property
    def size(self) -> int:
        """The bytes of all tensors."""
        return sum(info.size for info in self._known.values())

    def read(self, name: str, rows: slice | None = None) -> pxd.Array:
        """A tensor, or rows of it, in the state after all updates. Raises KeyError, PxdError."""
        info = self._known[name]
        array = self._after_all(name)
        if rows is None:
            return array
        start, stop, _ = rows.indices(info.shape[0])
        first = info.dtype.first_rows(array, info.shape, max(start, stop))
        return info.dtype.rows_from(first, info.shape, start)

    def _after_all(self, name: str) -> pxd.Array:
        """A tensor after all updates, from the newest one without a base for it, or from the base."""
        steps: list[tuple[pxd.DeltaFile, pxd.ModuleEntry]] = []
        for update in reversed(self._updates):
            name = self._modules[id(update)].get(name, name)
            entry = update.entry(name)
            steps.append((update, entry))
            if entry.base is None:
                break
        array = None if steps and steps[-1][1].base is None else self._base.read(name)
        for update, entry in reversed(steps):
            with located(update.path):
                if array is not None:
                    pxd.check_base_bytes(entry, array)
                array = pxd.reconstruct(update.load(entry.name), array)
        if array is None:
            raise KeyError(name)
        return array

    def sha256(self, name: str, *, progress: Callable[[int], None] | None = None) -> str:
        """The hex digest of a tensor in this state."""
        array = self.read(name)
        if progress is not None:
            progress(array.nbytes)
        return hashlib.sha256(pxd.raw_bytes(array)).hexdigest()

    def close(self) -> None:
        """Do nothing, because the caller closes base and updates."""


def _info(name: str, entry: pxd.ModuleEntry, path: Path) -> pxd.TensorInfo:
    size = entry.dtype.size_of(entry.shape)
    return pxd.TensorInfo(name=name, dtype=entry.dtype, shape=entry.shape, file=path, begin=0, end=size)
