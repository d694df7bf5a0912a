"""The work folder: the finished parts of a run on disk, so that a killed run can resume and ends in the same bytes.

OUT.peraxis-work/
  inputs.json        the digest that binds the folder to checkpoints, text and options: another run starts anew; and
                     the number of threads, on which last bits depend
  PART.json, PART.bin   the modules of one part (embedding, a block, the head): index and arrays
  distilling.npz     distillation after its last whole epoch; distill-best: the best state so far

A part is written atomically, the json last, and each file ends with the SHA-256 of its data; a damaged part is computed
again. Hidden states are not saved: a resumed run computes them again with the same operations and so the same bits,
which costs two forward passes for each finished block.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np

from peraxis_format import Array, Axis, Component, atomic_file, raw_bytes
from peraxis_tools.compress.run.types import FittedModule, ModuleReport
from peraxis_tools.display.notes import note
from peraxis_tools.display.shown import counted
from peraxis_tools.process.threads import THREADS_MAX

__all__ = ["WorkFolder", "pack_modules", "unpack_modules"]

_LOG: Final = logging.getLogger("peraxis")
_INPUTS = "inputs.json"
_DIGEST_BYTES: Final = 32
_CHUNK: Final = 1 << 20
_TYPES = {"mask": np.uint8, "row": np.float16, "col": np.float16, "scalar": np.float16}


class WorkFolder:
    """The finished parts of one run, which `digest` identifies."""

    def __init__(
        self, output: Path, digest: str, *, resume: bool, threads: int | None = None, is_main_process: bool = True
    ) -> None:
        """threads: those of this run, recorded if it begins anew.

        is_main_process: whether this process makes the folder; the others must wait for it before they read.
        """
        self.path = output.with_name(output.name + ".peraxis-work")
        self._run = digest
        if not is_main_process:
            return
        if self.path.exists() and not (resume and self._recorded("digest") == digest):
            if resume and self.finished():
                note(f"{self.path}: belongs to a run with other inputs, options or version; this run begins anew")
            shutil.rmtree(self.path)
        try:
            self.path.mkdir(exist_ok=True)
            if {path.name for path in self.path.iterdir()} <= {_INPUTS}:
                with atomic_file(self.path / _INPUTS) as file:
                    file.write(json.dumps({"digest": digest, "threads": threads}).encode())
        except BaseException:
            self.remove(unless_used=True)
            raise

    @property
    def threads(self) -> int | None:
        """The number of threads of the run that began the folder; None if no possible number is recorded."""
        found = self._recorded("threads")
        return found if type(found) is int and 0 < found <= THREADS_MAX else None

    def _recorded(self, key: str) -> object:
        try:
            return json.loads((self.path / _INPUTS).read_bytes())[key]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def finished(self) -> str | None:
        """The finished work in this folder as a phrase, like `3 blocks`; None if there is none."""
        names = {path.name for path in self.path.glob("*")} - {_INPUTS}
        blocks = sum(re.fullmatch(r"block-\d+\.json", name) is not None for name in names)
        if "distilled.json" in names:
            return "the distilled modules"
        if "distilling.npz" in names:
            return "the fit, and a part of the distillation"
        if blocks:
            return counted(blocks, "block")
        return "the samples of the fine-tuned model" if "generated.npy" in names else None

    def remove(self, *, unless_used: bool) -> None:
        """Remove the folder. unless_used: only if it holds nothing that a next run could continue."""
        if not unless_used or {path.name for path in self.path.glob("*")} <= {_INPUTS}:
            shutil.rmtree(self.path, ignore_errors=True)

    def load(self, part: str) -> list[FittedModule] | None:
        """The modules of a finished part; None if it is not finished, or damaged."""
        with self._opened(f"{part}.json") as index, self._opened(f"{part}.bin") as data:
            if index is None or data is None:
                return None
            return unpack_modules(json.loads(index.read()), bytearray(data.read()))

    def save_array(self, part: str, array: Array) -> None:
        """Save one array under this name."""
        with self._written(f"{part}.npy") as file:
            np.save(file, array, allow_pickle=False)

    def load_array(self, part: str) -> Array | None:
        """A saved array; None if it is missing or damaged."""
        with self._opened(f"{part}.npy") as file:
            return None if file is None else np.load(io.BytesIO(file.read()), allow_pickle=False)

    def save_arrays(self, part: str, arrays: Mapping[str, Array]) -> None:
        """Save named arrays in one file, which replaces an earlier one."""
        with self._written(f"{part}.npz") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def load_arrays(self, part: str) -> dict[str, Array] | None:
        """The arrays of `save_arrays`; None if they are missing or damaged."""
        with self._opened(f"{part}.npz") as file:
            if file is None:
                return None
            with np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}

    def save_text(self, part: str, text: Mapping[str, Any]) -> None:
        """Save JSON values under this name; those of a part are saved before the part itself."""
        with self._written(f"{part}.text.json") as file:
            file.write(json.dumps(dict(text)).encode())

    def load_text(self, part: str) -> dict[str, Any] | None:
        """The values of `save_text`; None if they are missing or damaged."""
        with self._opened(f"{part}.text.json") as file:
            return None if file is None else dict(json.loads(file.read()))

    def save(self, part: str, modules: Sequence[FittedModule]) -> None:
        """Save a finished part."""
        entries, data = pack_modules(modules)
        with self._written(f"{part}.bin") as file:
            file.write(data)
        with self._written(f"{part}.json") as file:
            file.write(json.dumps(entries).encode())

    def _hash(self, name: str) -> Any:
        """A hash that begins with the run and the name, so that no file can replace another."""
        return hashlib.sha256(f"{self._run} {name}\n".encode())

    @contextlib.contextmanager
    def _written(self, name: str) -> Iterator[BinaryIO]:
        """Yield a file to write; its digest is written after its data."""
        digest = self._hash(name)
        with atomic_file(self.path / name) as file:
            yield cast(BinaryIO, _Hashing(file, digest))
            file.write(digest.digest())

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO | None]:
        """Yield the file after its digest is checked; None if it is missing or damaged (then logged)."""
        path = self.path / name
        try:
            file = open(path, "rb")  # noqa: SIM115  closed below
        except FileNotFoundError:
            yield None
            return
        with file:
            size = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
            if size < 0 or not self._holds(file, name, size):
                _LOG.warning("%s: is damaged; its content is computed again", path)
                yield None
                return
            file.seek(0)
            yield cast(BinaryIO, _Head(file, size))

    def _holds(self, file: BinaryIO, name: str, size: int) -> bool:
        digest = self._hash(name)
        left = size
        while left and (chunk := file.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
        return bool(file.read(_DIGEST_BYTES) == digest.digest())


class _Hashing:
    """Passes bytes on to a file and a digest. It cannot seek, so zip archives are written sequentially."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest = file, digest

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def read(self, size: int = -1) -> bytes:
        """numpy recognises a file by this method."""
        raise io.UnsupportedOperation("read")


class _Head(io.RawIOBase):
    """The first `size` bytes of an open file, as a file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._file.read(min(len(view), max(0, self._size - self._file.tell())))
        view[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._file.tell(), os.SEEK_END: self._size}[whence]
        return self._file.seek(max(0, start + offset))

    def tell(self) -> int:
        return self._file.tell()


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
        raise ValueError("a saved component has no mask")
    return Component(
        axis=Axis(entry["axis"]),
        exponent=entry["exponent"],
        mask=mask,
        row=array("row"),
        col=array("col"),
        scalar=array("scalar"),
    )
