"""A checkpoint that consists of a base and updates on it: tensors, read and checked one by one, and small files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import peraxis_format as pxd
from peraxis_format.errors import located
from peraxis_tools.checkpoints.assets import with_groups
from peraxis_tools.checkpoints.checkpoint import Checkpoint
from peraxis_tools.checkpoints.derived import DerivedCheckpoint
from peraxis_tools.display.shown import counted

__all__ = ["ChainState", "NoState", "StateNames", "state_after", "state_before"]


def _assets_after(updates: Iterable[pxd.DeltaFile]) -> dict[str, bytes]:
    """The small files that these updates have, in order: path -> bytes. Of each group the last update that has it."""
    found: dict[str, pxd.DeltaFile] = {}
    for update in updates:
        found = with_groups(found, {asset.path: update for asset in update.manifest.assets})
    return {path: update.asset(path) for path, update in found.items()}  # those before are not read


def state_after(base: Checkpoint, updates: Sequence[pxd.DeltaFile]) -> Checkpoint:
    """The checkpoint after some updates in order. The caller closes both."""
    return replace(base, tensors=ChainState(base.tensors, updates), newer=_assets_after(updates))


def state_before(files: Sequence[pxd.DeltaFile], base: Checkpoint) -> Checkpoint:
    """What the last of these files, in order, is applied to: the base, or the state after the others."""
    return base if len(files) == 1 else state_after(base, files[:-1])


class ChainState(DerivedCheckpoint):
    """The state after some updates, as a checkpoint. The caller closes the base and the updates.

    Reading a tensor reads it from the base once, checks its digest, and applies every update. Raises E404 or E405 if a
    state is not the one that an update was made on.
    """

    def __init__(self, base: pxd.Safetensors, updates: Sequence[pxd.DeltaFile]) -> None:
        self._base = base
        self._updates = tuple(updates)
        label = base.label if not updates else f"{base.label} + {counted(len(updates), 'update')}"
        super().__init__(base, base.infos(), label=label)
        # For each update: the module of each alias.
        self._modules = {id(update): {alias: name for name, alias in update.manifest.tied} for update in self._updates}
        for update in self._updates:
            self._take_over(update)

    def _take_over(self, update: pxd.DeltaFile) -> None:
        pxd.check_base_names(update.manifest, self)
        self._tensors, self._foreign = _infos_after(update), {}  # an update names all that its state has

    def _whole(self, name: str) -> pxd.Array:
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


class StateNames(DerivedCheckpoint):
    """The names, dtypes and shapes of the state after an update, without the tensors."""

    def __init__(self, update: pxd.DeltaFile) -> None:
        self.label = str(update.path)
        self._tensors = _infos_after(update)
        self._foreign = {}

    def _whole(self, name: str) -> pxd.Array:
        raise KeyError(name)


class NoState(DerivedCheckpoint):
    """The state before an anchor: it has no tensors."""

    def __init__(self, base: pxd.Safetensors) -> None:
        super().__init__(base, (), label="no state")
        self._foreign = {}

    def _whole(self, name: str) -> pxd.Array:
        raise KeyError(name)


def _infos_after(update: pxd.DeltaFile) -> dict[str, pxd.TensorInfo]:
    known = {entry.name: _info(entry.name, entry, update.path) for entry in update.manifest.modules}
    known |= {alias: _info(alias, update.entry(module), update.path) for module, alias in update.manifest.tied}
    return dict(sorted(known.items()))


def _info(name: str, entry: pxd.ModuleEntry, path: Path) -> pxd.TensorInfo:
    size = entry.dtype.size_of(entry.shape)
    return pxd.TensorInfo(name=name, dtype=entry.dtype, shape=entry.shape, file=path, begin=0, end=size)
