"""The work folder: what a run has fitted so far, on disk, so that a killed run goes on and ends in the same bytes.

OUT.peraxis-work/
  inputs.json        the digest that binds the folder to checkpoints, text and options; another run starts afresh
  PART.json, PART.bin   the modules of one part (embedding, a block, the head): index and arrays
  distilling.npz     distillation after its last whole epoch; distill-best: the best state by then

A part is written under a temporary name and renamed, the json last: it is there whole or not at all. Hidden
states are not kept: a resumed run computes them again, with the same operations and so to the same bits, which costs
two forward passes for each finished block.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peraxis_format import Array, Axis, Component, atomic_file, raw_bytes
from peraxis_tools.compress.run.types import FittedModule, ModuleReport

__all__ = ["WorkFolder", "pack_modules", "unpack_modules"]

_INPUTS = "inputs.json"
_TYPES = {"mask": np.uint8, "row": np.float16, "col": np.float16, "scalar": np.float16}


class WorkFolder:
    """Finished parts of one run. `digest` says of which."""

    def __init__(self, output: Path, digest: str, *, resume: bool, is_main_process: bool = True) -> None:
        """is_main_process: whether this process makes the folder; others are to wait for it before they read."""
        self.path = output.with_name(output.name + ".peraxis-work")
        if not is_main_process:
            return
        if self.path.exists() and not (resume and self._digest() == digest):
            shutil.rmtree(self.path)
        self.path.mkdir(exist_ok=True)
        if self._digest() is None:
            with atomic_file(self.path / _INPUTS) as file:
                file.write(json.dumps({"digest": digest}).encode())

    def _digest(self) -> str | None:
        try:
            return str(json.loads((self.path / _INPUTS).read_bytes())["digest"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def load(self, part: str) -> list[FittedModule] | None:
        """The modules of a finished part; None where it is not finished."""
        index = self.path / f"{part}.json"
        if not index.is_file():
            return None
        data = bytearray((self.path / f"{part}.bin").read_bytes())
        return unpack_modules(json.loads(index.read_bytes()), data)

    def save_array(self, part: str, array: Array) -> None:
        """Store one array under a name of its own."""
        with atomic_file(self.path / f"{part}.npy") as file:
            np.save(file, array, allow_pickle=False)

    def load_array(self, part: str) -> Array | None:
        """A stored array; None where there is none."""
        path = self.path / f"{part}.npy"
        return np.load(path, allow_pickle=False) if path.is_file() else None

    def save_arrays(self, part: str, arrays: Mapping[str, Array]) -> None:
        """Store named arrays as one, over what was stored before."""
        with atomic_file(self.path / f"{part}.npz") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def load_arrays(self, part: str) -> dict[str, Array] | None:
        """What `save_arrays` stored; None where there is none."""
        path = self.path / f"{part}.npz"
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}

    def save_text(self, part: str, text: Mapping[str, Any]) -> None:
        """Store JSON values under a name of their own; for a part, before the part itself is saved."""
        with atomic_file(self.path / f"{part}.text.json") as file:
            file.write(json.dumps(dict(text)).encode())

    def load_text(self, part: str) -> dict[str, Any] | None:
        """What `save_text` stored; None where there is none."""
        path = self.path / f"{part}.text.json"
        return dict(json.loads(path.read_bytes())) if path.is_file() else None

    def save(self, part: str, modules: Sequence[FittedModule]) -> None:
        """Store a finished part."""
        entries, data = pack_modules(modules)
        with atomic_file(self.path / f"{part}.bin") as file:
            file.write(data)
        with atomic_file(self.path / f"{part}.json") as file:
            file.write(json.dumps(entries).encode())


def pack_modules(modules: Sequence[FittedModule]) -> tuple[list[dict[str, Any]], bytes]:
    """(index as JSON values, arrays one after the other). Law: unpack_modules(*pack_modules(m)) == m."""
    entries: list[dict[str, Any]] = []
    data = io.BytesIO()
    for module in modules:
        components = []
        for component in module.components:
            arrays: dict[str, Array] = {"mask": component.mask, **component.scales()}
            places = {name: _append(data, array) for name, array in arrays.items()}
            components.append({"axis": component.axis.value, "exponent": component.exponent, "arrays": places})
        report = module.report
        fields = [report.error, report.error_none, report.error_same, report.note]
        full = None if module.full is None else [module.full.dtype.str, *_append(data, module.full)]
        entries.append({"name": module.name, "components": components, "report": fields, "full": full})
    return entries, data.getvalue()


def _append(data: io.BytesIO, array: Array) -> tuple[int, list[int]]:
    offset = data.tell()
    data.write(raw_bytes(np.ascontiguousarray(array)))
    return offset, list(array.shape)


def _view(data: bytearray, dtype: Any, offset: int, shape: Sequence[int]) -> Array:
    return np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape)


def unpack_modules(entries: Sequence[dict[str, Any]], data: bytearray) -> list[FittedModule]:
    """The inverse of pack_modules; arrays are views of data, and writable."""
    return [_module(entry, data) for entry in entries]


def _module(entry: dict[str, Any], data: bytearray) -> FittedModule:
    error, error_none, error_same, note = entry["report"]
    return FittedModule(
        name=entry["name"],
        components=tuple(_component(component, data) for component in entry["components"]),
        report=ModuleReport(error=error, error_none=error_none, error_same=error_same, note=note),
        full=None if entry["full"] is None else _view(data, *entry["full"]),
    )


def _component(entry: dict[str, Any], data: bytearray) -> Component:
    def array(name: str) -> Array | None:
        if name not in entry["arrays"]:
            return None
        return _view(data, _TYPES[name], *entry["arrays"][name])

    mask = array("mask")
    if mask is None:
        raise ValueError("a stored component has no mask")
    return Component(
        axis=Axis(entry["axis"]),
        exponent=entry["exponent"],
        mask=mask,
        row=array("row"),
        col=array("col"),
        scalar=array("scalar"),
    )
