"""Read plain safetensors checkpoints: names, dtypes, shapes, and rows of tensors, from the shards.

Reads go into new buffers, not through a map of the whole file, so a streaming program uses only the memory that it asks
for. A checkpoint is not a PXD file, so its parser is as lenient as safetensors' own, but it refuses headers that lead
outside the file. As in safetensors' own, the tensors of a file must cover its data: without overlap, gap or remainder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np

from peraxis_format.checkpoint_files import INDEX_NAME, SINGLE_NAME, CheckpointFiles, find_files, foreign_kind
from peraxis_format.dtypes import Array, DType, raw_bytes
from peraxis_format.errors import CODES, CheckpointError
from peraxis_format.strict_json import INTEGER_MAX, Json, StrictJsonError, parse_strict_json

__all__ = ["INDEX_NAME", "SINGLE_NAME", "Safetensors", "TensorInfo"]

_HEADER_MAX: Final = 100_000_000  # safetensors' own bound
_DIMENSIONS_MAX: Final = 64  # torch's and numpy's own bound
_CHUNK: Final = 1 << 20
_Stamp: TypeAlias = tuple[int, int]  # size and time of change of a file; inodes of network file systems may change


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: dtype, shape, and its byte range [begin, end) in its file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True, kw_only=True)
class _Foreign:
    """A tensor of a dtype that is unknown to the format. Its shape cannot be checked; its bytes are never read."""

    name: str
    dtype: str
    file: Path
    begin: int
    end: int

    def refused(self) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: tensor {self.name!r} has dtype {self.dtype[:32]!r}, which PXD does not allow (SPEC 1); "
            "save the checkpoint without it or in another dtype"
        )


_Record = TypeVar("_Record", TensorInfo, _Foreign)


class Safetensors:
    """A checkpoint in safetensors files: one file, or the shards of a folder. A context manager.

    A read-only mapping of tensor names to TensorInfo, in name order. Reads may come from several threads. Tensors of
    dtypes that are unknown to the format are no part of the mapping (SPEC 7): `foreign` has their names and dtypes.
    """

    def __init__(self, found: CheckpointFiles, *, label: str) -> None:
        self.label = label
        self.files = found.files
        self._descriptors: dict[Path, int] = {}
        self._stamps: dict[Path, _Stamp] = {}
        placed, twice = _tensors_of(found, label, self._stamps)
        tensors = dict(sorted(placed.items()))
        self.ignored = found.ignored if twice is None else (*found.ignored, twice)
        self._tensors = {name: info for name, info in tensors.items() if isinstance(info, TensorInfo)}
        self._foreign = {name: info for name, info in tensors.items() if isinstance(info, _Foreign)}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Safetensors:
        """Open a folder, an index, or one file.

        A folder's files are found in transformers' order (checkpoint_files.py); `ignored` has a sentence for
        weights that are not read. Raises CheckpointError if there is no checkpoint, or a malformed one.
        """
        path = Path(path)
        return cls(find_files(path), label=str(path))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    @property
    def foreign(self) -> dict[str, str]:
        """The names and dtypes of tensors whose dtype is unknown to the format, in name order."""
        return {name: tensor.dtype for name, tensor in self._foreign.items()}

    def check_dtypes(self, names: Container[str] | None = None) -> None:
        """Raise CheckpointError for a tensor whose dtype is unknown to the format. names: only these are used."""
        for name, tensor in self._foreign.items():
            if names is None or name in names:
                raise tensor.refused()

    def infos(self) -> list[TensorInfo]:
        """Every tensor, in name order."""
        return list(self._tensors.values())

    @property
    def size(self) -> int:
        """The bytes of all tensors."""
        return sum(info.size for info in self._tensors.values())

    def renamed(self, names: Mapping[str, str]) -> Safetensors:
        """The same tensors with the new names of `names`; it is closed with this object.

        Raises CheckpointError if two tensors would have one name.
        """
        other = copy(self)
        other._tensors, other._foreign = _renamed(self._tensors, names), _renamed(self._foreign, names)
        if len({**other._tensors, **other._foreign}) != len(self._tensors) + len(self._foreign):
            raise CheckpointError(f"{self.label}: two tensors would have one name; save the checkpoint again")
        return other

    def read(self, name: str, rows: slice | None = None) -> Array:
        """Read a tensor, or a range of its first dimension, into a new array.

        Returns a storage array. Rows of a packed type (F4, F6) must begin and end at whole bytes. Raises KeyError,
        CheckpointError for a file that ends too early.
        """
        info = self._tensors[name]
        shape, begin = info.shape, info.begin
        if rows is not None:
            start, stop, step = rows.indices(shape[0])
            if step != 1:
                raise ValueError("rows must be contiguous")
            shape = (max(0, stop - start), *shape[1:])
            begin += info.dtype.size_of((start, *shape[1:]))
        out: Array = np.empty(info.dtype.storage_shape(shape), info.dtype.storage)
        self._read_into(info, raw_bytes(out), begin)
        return out

    def sha256(self, name: str, *, progress: Callable[[int], None] | None = None) -> str:
        """The hex digest of a tensor's raw bytes; progress is called with each number of bytes done."""
        info = self._tensors[name]
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(_CHUNK, max(1, info.size))))
        for begin in range(info.begin, info.end, _CHUNK):
            part = buffer[: min(_CHUNK, info.end - begin)]
            self._read_into(info, part, begin)
            digest.update(part)
            if progress is not None:
                progress(len(part))
        return digest.hexdigest()

    def _read_into(self, info: TensorInfo, target: memoryview, begin: int) -> None:
        descriptor = self._descriptors.get(info.file)
        if descriptor is None:
            descriptor = self._opened(info.file)
        done = 0
        while done < len(target):
            count = os.preadv(descriptor, [target[done:]], begin + done)
            if count == 0:
                raise CheckpointError(f"{info.file}: ends within tensor {info.name!r}; fetch the file again")
            done += count

    def _opened(self, file: Path) -> int:
        """A descriptor of a file, which must be the one that the header was read from."""
        descriptor = os.open(file, os.O_RDONLY)
        if _stamp_of(os.fstat(descriptor)) != self._stamps.get(file):
            os.close(descriptor)
            raise _changed(file)
        kept = self._descriptors.setdefault(file, descriptor)
        if kept != descriptor:  # another thread was faster
            os.close(descriptor)
        return kept

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file was written since its header was read.

        The bytes that were read may then be of two states. A writer checks this before its output gets its name. An
        open file may be replaced by another one, because the open one does not change.
        """
        for file, descriptor in list(self._descriptors.items()):
            if _stamp_of(os.fstat(descriptor)) != self._stamps[file]:
                raise _changed(file)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> Safetensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _renamed(tensors: Mapping[str, _Record], names: Mapping[str, str]) -> dict[str, _Record]:
    """The tensors with the new names of `names`, in name order."""
    renamed = (replace(tensor, name=names.get(name, name)) for name, tensor in tensors.items())
    return {tensor.name: tensor for tensor in sorted(renamed, key=lambda tensor: tensor.name)}


def _stamp_of(about: os.stat_result) -> _Stamp:
    return about.st_size, about.st_mtime_ns


def _changed(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file}: was replaced or written while it was read; wait for its writer, and run this again"
    )


def _tensors_of(
    found: CheckpointFiles, label: str, stamps: dict[Path, _Stamp]
) -> tuple[dict[str, TensorInfo | _Foreign], str | None]:
    """Every tensor, from the file that the index names, or else from the one file that has it.

    Also a sentence on tensors that another file has too: transformers takes the last one that it reads. stamps: gets
    that of each file.
    """
    tensors: dict[str, TensorInfo | _Foreign] = {}
    twice: list[str] = []
    for file in found.files:
        infos, stamps[file] = _read_infos(file)
        for info in infos:
            before = tensors.get(info.name)
            owner = found.owners.get(info.name)
            if before is not None:
                twice.append(f"{info.name!r} is in {before.file.name} and {file.name}")
            if before is None or owner == file.name:
                tensors[info.name] = info
            elif owner != before.file.name:
                raise CheckpointError(
                    f"{file}: tensor {info.name!r} is in {before.file.name} too, and no index says which of them "
                    "holds; pass a folder with one copy of each tensor"
                )
    lost = next((name for name in found.owners if name not in tensors), None)
    if lost is not None:
        raise CheckpointError(
            f"{label}: the index places tensor {lost!r} in {found.owners[lost]}, which does not have it; "
            "fetch the checkpoint again"
        )
    if not twice:
        return tensors, None
    others = f", and {len(twice) - 1} more are in two files" if len(twice) > 1 else ""
    return tensors, f"{label}: {twice[0]}{others}; the index decides, but transformers may take the other"


def _read_infos(file: Path) -> tuple[list[TensorInfo | _Foreign], _Stamp]:
    """The tensors of a file, and its stamp."""
    with open(file, "rb") as stream:
        about = os.fstat(stream.fileno())
        size = about.st_size
        start = stream.read(64)
        kind = foreign_kind(start)
        if kind is not None:
            raise CheckpointError(f"{file}: is {kind}")
        length = int.from_bytes(start[:8], "little")
        stream.seek(8)
        if size < 8 or not 2 <= length <= min(_HEADER_MAX, size - 8):
            raise CheckpointError(f"{file}: not a safetensors file, or truncated (header length); fetch it again")
        try:
            header = _header(stream.read(length))
            header.pop("__metadata__", None)
            infos = [_info(name, value, file, 8 + length, size) for name, value in header.items()]
            _check_cover(infos, 8 + length, size)
            return infos, _stamp_of(about)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{file}: malformed safetensors header ({error}); fetch it again") from None


def _header(data: bytes) -> dict[str, Any]:
    """The members of a header, which is JSON by SPEC 7.5. Raises ValueError."""
    try:
        header: Json = parse_strict_json(data)
    except StrictJsonError as error:
        raise ValueError(f"{CODES[error.code].meaning}: {error.detail}") from None
    if not isinstance(header, dict):
        raise ValueError("it is not an object")
    if b"\\u" in data:  # only an escape gives an unpaired surrogate
        try:
            json.dumps(header, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it has text that is not valid Unicode") from None
    return header


def _check_cover(infos: Iterable[TensorInfo | _Foreign], data: int, size: int) -> None:
    """Check that the tensors cover [data, size) once. So the bytes that are read are no more than those of the file."""
    at = data
    for info in sorted(infos, key=lambda info: (info.begin, info.end)):
        if info.begin != at:
            raise ValueError(
                f"tensor {info.name!r}: {'overlaps another' if info.begin < at else 'has a gap before it'}"
            )
        at = info.end
    if at != size:
        raise ValueError(f"{size - at} bytes after the last tensor")


def _whole(value: object) -> int:
    """A number of a header; it must be an integer of the range, not a float or text that converts to one."""
    if type(value) is not int or not 0 <= value <= INTEGER_MAX:
        raise ValueError(f"{str(value)[:32]!r} is not an integer from 0 to 2^53 - 1")
    return value


def _info(name: str, value: dict[str, Any], file: Path, data: int, size: int) -> TensorInfo | _Foreign:
    if not isinstance(value["dtype"], str) or not isinstance(value["shape"], list):
        raise ValueError(f"tensor {name!r}: its dtype is not a text, or its shape is not a list")
    if len(value["shape"]) > _DIMENSIONS_MAX:
        raise ValueError(f"tensor {name!r}: has {len(value['shape'])} dimensions")
    shape = tuple(map(_whole, value["shape"]))
    begin, end = (data + offset for offset in map(_whole, value["data_offsets"]))
    dtype = DType(value["dtype"]) if value["dtype"] in DType.__members__ else None
    fits = end >= begin if dtype is None else dtype.fits(shape) and end - begin == dtype.size_of(shape)
    if not fits:
        raise ValueError(f"tensor {name!r}: offsets do not fit its shape")
    if end > size:
        raise CheckpointError(f"{file}: ends within tensor {name!r} ({size} of {end} bytes); fetch it again")
    if dtype is None:
        return _Foreign(name=name, dtype=value["dtype"], file=file, begin=begin, end=end)
    return TensorInfo(name, dtype, shape, file, begin, end)
