"""nemo-rl: the payload of NeMo-RL's sparse refit, torch.save of (locations, value groups, metadata) under zstd.

locations      uint8: for each tensor the gaps between changed weights (the number of weights between two), as
               uint16, uint32 or uint64, the smallest that fits all gaps of the tensor
value groups   a tuple of tensors, one per dtype: values of all tensors of that dtype, concatenated, as integers
metadata       a list of dictionaries: name, shape, dtype, operation ("xor" or "overwrite"), value_group,
               value_start, value_end, index_encoding ("deltas" with index_start and index_end in bytes of the
               locations, or "range" with range_start)
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_tools.convert.torch_files import check_plain, load_plain
from peraxis_tools.convert.wires import zstd
from peraxis_tools.convert.wires.change import TensorChange, changed_words, checked_index
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.process.optional import require

__all__ = ["NemoFile", "NemoTensor", "pack", "write"]

# Bytes of a payload, at most, for the bytes of a base: a value and a location of 4 bytes for each weight of 2 bytes. A
# location has 8 bytes only in tensors beyond 2^32 weights.
_LIMIT_FACTOR: Final = 3
_LIMIT_SLACK: Final = 1 << 24  # bytes of metadata, at most
_DTYPES: Final = {pxd.DType.BF16: "bfloat16", pxd.DType.F16: "float16", pxd.DType.F32: "float32"}
_INTS: Final = {2: np.int16, 4: np.int32}  # signed, because torch has no full support of uint16
_WIDTHS: Final = (2, 4, 8)
_OFFSETS: Final = ("value_group", "value_start", "value_end")


class NemoFile:
    """One payload, read whole: a torch file, with or without zstd."""

    def __init__(self, path: Path, base_size: int) -> None:
        """base_size: the bytes of the state before, which bound the payload. Raises ToolError, MissingPackageError."""
        self._path = path
        locations, groups, items = _loaded(path, limit=_LIMIT_FACTOR * base_size + _LIMIT_SLACK)
        self._locations = locations
        self._groups = groups
        self._items: dict[str, Mapping[str, Any]] = {}
        for number, item in enumerate(items):
            name = item.get("name") if isinstance(item, dict) else None
            if not isinstance(name, str):
                raise ToolError(f"{path}: entry {number} of its metadata has no name; not a payload of nemo-rl")
            if name in self._items:
                raise ToolError(f"{path}: {name}: is twice in its metadata, the second time at {number}")
            self._items[name] = item

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that it changes."""
        return tuple(self._items)

    def change(self, name: str, info: pxd.TensorInfo) -> TensorChange:
        """See WireFile."""
        item, where = self._items[name], f"{self._path}: {name}"
        shape, dtype = item.get("shape"), _word(item, "dtype", where)
        if not isinstance(shape, tuple | list) or not all(isinstance(extent, int) for extent in shape):
            raise ToolError(
                f"{where}: its shape is {type(shape).__name__}, not a tuple of numbers; write the wire again"
            )
        if list(shape) != list(info.shape) or dtype != _DTYPES.get(info.dtype):
            raise CheckFailedError(
                f"{where}: is {dtype[:32]} {list(shape[:8])}, "
                f"the base's tensor is {info.dtype.value} {list(info.shape)}"
            )
        operation = _word(item, "operation", where)
        if operation not in ("xor", "overwrite"):
            raise ToolError(
                f"{where}: its operation is {operation[:32]!r}, neither 'xor' nor 'overwrite'; write the wire again"
            )
        words = self._values(item, info.dtype, where)
        index = self._index(item, words.size, where)
        order = checked_index(where, index, math.prod(info.shape))
        if order is not None:  # gaps that overflow
            raise ToolError(f"{where}: its locations do not ascend; write the wire again")
        return TensorChange(index=index, words=words, is_xor=operation == "xor")

    def _values(self, item: Mapping[str, Any], dtype: pxd.DType, where: str) -> pxd.Array:
        group, begin, end = (_number(item, key, where) for key in _OFFSETS)
        if group >= len(self._groups):
            raise ToolError(f"{where}: value_group is {group}; the payload has {len(self._groups)}")
        values = self._groups[group]
        if values.dtype.itemsize != dtype.itemsize:
            raise ToolError(f"{where}: its values are {values.dtype.itemsize} bytes wide, its dtype {dtype.itemsize}")
        if not begin < end <= values.size:
            raise ToolError(
                f"{where}: values {begin} to {end} are not within group {group}, which ends at {values.size}"
            )
        return values.view(f"<u{dtype.itemsize}")[begin:end]

    def _index(self, item: Mapping[str, Any], count: int, where: str) -> NDArray[np.int64]:
        encoding = _word(item, "index_encoding", where)
        if encoding == "range":
            return np.arange(count, dtype=np.int64) + _number(item, "range_start", where)
        if encoding != "deltas":
            raise ToolError(
                f"{where}: its index_encoding is {encoding[:32]!r}, neither 'range' nor 'deltas'; write the wire again"
            )
        begin, end = (_number(item, key, where) for key in ("index_start", "index_end"))
        width = (end - begin) // count
        if not begin <= end <= self._locations.size or (end - begin) != width * count or width not in _WIDTHS:
            raise ToolError(
                f"{where}: locations {begin} to {end} are not gaps of {count} values (of {self._locations.size} bytes)"
            )
        gaps = np.frombuffer(self._locations[begin:end].tobytes(), f"<u{width}")
        if width == 8 and gaps.size and int(gaps.max()) >= 1 << 48:
            raise ToolError(f"{where}: the gap at {int(gaps.argmax())} is {int(gaps.max())}; write the wire again")
        return np.cumsum(gaps.astype(np.int64) + 1) - 1

    def check(self, name: str, new: pxd.Array) -> None:
        """Do nothing, because the payload has no checksums of new tensors."""

    def close(self) -> None:
        """Do nothing, because no file is open."""


def _word(item: Mapping[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise ToolError(f"{where}: its {key} is {type(value).__name__}, not a word; write the wire again")
    return value


def _number(item: Mapping[str, Any], key: str, where: str) -> int:
    value = item.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 48:
        shown = value if isinstance(value, int) else type(value).__name__
        raise ToolError(f"{where}: its {key} is {shown}, not a number of at least 0; write the wire again")
    return value


def _loaded(path: Path, *, limit: int) -> tuple[NDArray[np.uint8], list[pxd.Array], list[Any]]:
    """The payload: locations, value groups and metadata. limit: its bytes, at most."""
    require("a payload of nemo-rl", "torch")
    import torch

    data = path.read_bytes()
    if data.startswith(zstd.MAGIC):
        data = zstd.decompress(data, limit=limit, where=str(path))
    found = load_plain(data, where=str(path), kind="a payload of nemo-rl")
    if not isinstance(found, tuple) or len(found) != 3 or not isinstance(found[2], list):
        raise ToolError(f"{path}: is not a tuple of locations, value groups and metadata; not a payload of nemo-rl")
    locations, groups, items = found
    if not isinstance(locations, torch.Tensor) or locations.dtype is not torch.uint8 or locations.ndim != 1:
        raise ToolError(f"{path}: its locations are not a flat uint8 tensor; not a payload of nemo-rl")
    if not isinstance(groups, tuple | list) or not all(isinstance(group, torch.Tensor) for group in groups):
        raise ToolError(f"{path}: its value groups are not tensors; not a payload of nemo-rl")
    named = [("locations", locations), *((f"value group {i}", group) for i, group in enumerate(groups))]
    check_plain(named, size=len(data), where=str(path))
    for name, tensor in named:
        if tensor.ndim != 1 or not tensor.is_contiguous() or tensor.element_size() not in (1, *_INTS):
            raise ToolError(f"{path}: {name} is not a flat tensor of words; not a payload of nemo-rl")
    flat = [group.detach().view(torch.uint8).numpy() for group in groups]
    arrays = [a.view(f"<u{group.element_size()}") for a, group in zip(flat, groups, strict=True)]
    return locations.detach().numpy(), arrays, items


@dataclass(frozen=True, slots=True, kw_only=True)
class NemoTensor:
    """One tensor's part of a payload."""

    name: str
    dtype: pxd.DType
    shape: tuple[int, ...]
    index: NDArray[np.int64]
    words: pxd.Array


def pack(name: str, dtype: pxd.DType, old: pxd.Array, new: pxd.Array) -> NemoTensor:
    """Pack one changed tensor. Raises ToolError for one that is not BF16, F16 or F32."""
    if dtype not in _DTYPES:
        raise ToolError(f"{name}: is {dtype.value}, which nemo-rl does not send; use the wire xor")
    index, words = changed_words(old, new)
    return NemoTensor(name=name, dtype=dtype, shape=new.shape, index=index, words=words)


def write(path: Path, packed: Sequence[NemoTensor], *, overwrite: bool) -> int:
    """Write the payload. Returns its size in bytes. Raises MissingPackageError."""
    require("a payload of nemo-rl", "torch")
    import torch

    widths = sorted({item.dtype.itemsize for item in packed})
    starts = dict.fromkeys(widths, 0)
    locations: list[bytes] = []
    at, metadata = 0, []
    for item in packed:
        entry, gaps = _entry(item, at)
        group = item.dtype.itemsize
        begin, end = starts[group], starts[group] + item.words.size
        starts[group] = end
        metadata.append({**entry, "value_group": widths.index(group), "value_start": begin, "value_end": end})
        locations.append(gaps)
        at += len(gaps)
    groups = tuple(
        torch.from_numpy(
            np.concatenate([item.words for item in packed if item.dtype.itemsize == width]).view(_INTS[width])
        )
        for width in widths
    )
    joined = torch.from_numpy(np.array(bytearray(b"".join(locations)), np.uint8))
    buffer = io.BytesIO()
    torch.save((joined, groups, metadata), buffer)
    data = zstd.compress(buffer.getvalue())
    with pxd.atomic_file(path, overwrite=overwrite) as file:
        file.write(data)
    return len(data)


def _entry(item: NemoTensor, at: int) -> tuple[dict[str, Any], bytes]:
    """A tensor's metadata without its values, and its gaps. at: bytes of locations before it."""
    entry: dict[str, Any] = {
        "name": item.name,
        "shape": item.shape,
        "dtype": _DTYPES[item.dtype],
        "operation": "xor",
    }
    if int(item.index[-1] - item.index[0]) + 1 == item.index.size:
        entry |= {"index_start": at, "index_end": at, "index_encoding": "range", "range_start": int(item.index[0])}
        return entry, b""
    gaps = np.diff(item.index, prepend=-1) - 1
    width = next(width for width in _WIDTHS if int(gaps.max()) < 1 << (8 * width))
    data = gaps.astype(f"<u{width}").tobytes()
    entry |= {"index_start": at, "index_end": at + len(data), "index_encoding": "deltas"}
    return entry, data
