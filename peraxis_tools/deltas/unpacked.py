"""Exact updates as whole tensors, for verbs that use the dense delta, and a check of their results."""

from __future__ import annotations

from dataclasses import replace

import peraxis_format as pxd
from peraxis_format.errors import located
from peraxis_tools.errors import ToolError

__all__ = ["UnpackedFile", "check_results", "has_exact", "unpacked"]


def has_exact(manifest: pxd.Manifest) -> bool:
    """Whether a file has exact updates."""
    return any(module.encoding is pxd.Encoding.EXACT for module in manifest.modules)


def unpacked(file: pxd.DeltaFile, base: pxd.Safetensors | None) -> pxd.DeltaFile:
    """The file with its exact modules as `full` ones; loading one needs the base and checks its digest."""
    return UnpackedFile(file, base) if has_exact(file.manifest) else file


class UnpackedFile(pxd.DeltaFile):
    """An open file whose exact modules are rebuilt when they are loaded. Close the original file, not this one."""

    def __init__(self, file: pxd.DeltaFile, base: pxd.Safetensors | None) -> None:
        self.__dict__.update(file.__dict__)
        self._tensors = base

    def entry(self, name: str) -> pxd.ModuleEntry:
        """The manifest's entry, with `full` instead of `exact`. Raises KeyError."""
        entry = super().entry(name)
        if entry.encoding is not pxd.Encoding.EXACT:
            return entry
        return replace(entry, encoding=pxd.Encoding.FULL, size=None, result=None)

    def load(self, name: str) -> pxd.ModuleDelta:
        """The module, rebuilt if it is exact. Raises ToolError without a base, PxdError."""
        module = super().load(name)
        entry = super().entry(name)
        if entry.encoding is not pxd.Encoding.EXACT:
            return module
        if self._tensors is None:
            raise ToolError(f"{name}: is an exact update, which needs the base to decode; pass base (--base)")
        array = self._tensors.read(name)
        with located(self.path):
            pxd.check_base_bytes(entry, array)
            whole = pxd.reconstruct(module, array)
        return replace(module, encoding=pxd.Encoding.FULL, index=None, data=None, result=None, tail=None, full=whole)

    def __getitem__(self, name: str) -> pxd.ModuleDelta:
        return self.load(name) if super().entry(name).encoding is pxd.Encoding.EXACT else super().__getitem__(name)


def check_results(delta: pxd.DeltaFile, base: pxd.Safetensors) -> int:
    """Check the result of every exact module (SPEC 7.4), with one tensor in memory at a time. Returns their number.

    The base has been checked. Raises BindingError (E405).
    """
    exact = [entry for entry in delta.manifest.modules if entry.encoding is pxd.Encoding.EXACT]
    for entry in exact:
        array = base.read(entry.name)
        with located(delta.path):
            pxd.reconstruct(delta.load(entry.name), array)
    return len(exact)
