"""The bytes of a delta file that one process needs, cut into transfers: plain data for the stream and the kernels.

    Field        one part of a module (or of its box), at an offset in a transfer's buffer
    ModuleSlice  one module: its fields, and their live storage
    Transfer     neighbouring modules that are uploaded together: byte ranges of the file -> one buffer

A whole module is one range of the file (SPEC 4.3); consecutive modules become one longer range. Of a sharded module
only the box's bytes are read: rows of the mask, or bytes of each row, and their scales. If a box begins inside a byte,
the bits are shifted after they are read.

A buffer begins at the file offset rounded down to 4096, so that the same reads work with O_DIRECT and every tensor is
aligned in memory as in the file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from peraxis_format.bits import mask_width
from peraxis_format.delta import Encoding, ModuleDelta
from peraxis_format.dtypes import Array, DType
from peraxis_format.manifest import ModuleEntry
from peraxis_format.payload import assemble
from peraxis_format.reader import DeltaFile
from peraxis_format.sizes import ALIGNMENT, aligned
from peraxis_format.torch.place.shards import Box, Placement, ShardView, extent, storage_key, whole

__all__ = ["ALIGN", "TRANSFER_LIMIT", "ByteRange", "ModuleSlice", "Transfer", "cut_transfers", "piece"]

ALIGN: Final = 4096
TRANSFER_LIMIT: Final = 64 << 20  # bytes: two layers of an 8B model; four of them are the ring


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Copy `size` bytes at `source` in the file to `target` in the buffer."""

    source: int
    target: int
    size: int


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor in a buffer. shift: the bits by which a mask's rows must be shifted; read_width: their bytes."""

    suffix: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    shift: int = 0
    read_width: int = 0

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.dtype.size_of(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class ModuleSlice:
    """One module, or one box of it. begin, end: its bytes in the buffer. views: the live storages, usually one; none if
    an equal module writes them.
    """

    entry: ModuleEntry
    box: Box
    begin: int
    end: int
    fields: tuple[Field, ...]
    views: tuple[ShardView, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the buffer has the module's whole range, so that its digest can be checked."""
        return self.box == whole(self.entry.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The box's shape."""
        return extent(self.box)


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """Modules that are read and uploaded together. begin: the offset of the first module; size: the buffer's bytes."""

    begin: int
    size: int
    runs: tuple[ByteRange, ...]
    modules: tuple[ModuleSlice, ...]


def piece(slice_: ModuleSlice, buffer: Array) -> ModuleDelta:
    """The module (or its box, as a module) as views of a transfer's buffer (uint8, flat)."""
    arrays = {
        f.suffix: buffer[f.offset : f.offset + f.size].view(f.dtype.storage).reshape(f.shape) for f in slice_.fields
    }
    return assemble(slice_.entry, arrays, slice_.shape)


def cut_transfers(delta: DeltaFile, placement: Placement, *, limit: int) -> tuple[Transfer, ...]:
    """Cut the bytes that a placement needs of a file into transfers of at most `limit` bytes, or of one module.

    Every module (or box) is in exactly one transfer, so it is uploaded once. Pieces of exact modules are in none: ranks
    decode these together (place/sharded_exact.py). A storage is written once, even if equal modules share it.
    """
    written: set[tuple[Any, ...]] = set()
    transfers: list[Transfer] = []
    group: list[tuple[ModuleEntry, tuple[ShardView, ...]]] = []
    size = 0
    for entry in delta.manifest.modules:
        begin, end = delta.span(entry.name)
        placed = placement[entry.name]
        boxes = {shard.box: tuple(p for p in placed if p.box == shard.box) for shard in placed}
        exact = entry.encoding is Encoding.EXACT
        for box, of_box in boxes.items():
            if begin == end or math.prod(extent(box)) == 0 or (exact and box != whole(entry.shape)):
                continue
            views = tuple(shard for shard in of_box if storage_key(shard.live) not in written)
            written.update(storage_key(shard.live) for shard in views)
            if not exact and (box != whole(entry.shape) or len(boxes) > 1):
                transfers.append(_boxed(delta, entry, box, views))
                continue
            if group and size + end - begin > limit:
                transfers.append(_contiguous(delta, group))
                group, size = [], 0
            if group and begin - delta.span(group[-1][0].name)[1] >= ALIGNMENT:
                transfers.append(_contiguous(delta, group))
                group, size = [], 0
            group.append((entry, views))
            size += end - begin
    if group:
        transfers.append(_contiguous(delta, group))
    return tuple(sorted(_merged(transfers, limit), key=lambda t: t.runs[0].source))


def _contiguous(delta: DeltaFile, group: Sequence[tuple[ModuleEntry, tuple[ShardView, ...]]]) -> Transfer:
    """One range from the first byte of the first module to the last byte of the last module."""
    begin, end = delta.span(group[0][0].name)[0], delta.span(group[-1][0].name)[1]
    origin = begin // ALIGN * ALIGN
    modules = []
    for entry, views in group:
        first, last = delta.span(entry.name)
        fields = tuple(
            Field(r.name[len(entry.name) + 1 :], r.dtype, r.shape, delta.header_size + r.begin - origin)
            for r in delta.tensors(entry.name)
        )
        modules.append(ModuleSlice(entry, whole(entry.shape), first - origin, last - origin, fields, views))
    run = ByteRange(begin, begin - origin, end - begin)
    return Transfer(begin - origin, end - origin, (run,), tuple(modules))


def _boxed(delta: DeltaFile, entry: ModuleEntry, box: Box, views: tuple[ShardView, ...]) -> Transfer:
    """The bytes of one box, one tensor after the other."""
    offset = 0
    fields: list[Field] = []
    runs: list[ByteRange] = []
    for record in delta.tensors(entry.name):
        suffix = record.name[len(entry.name) + 1 :]
        part_box = _part_box(suffix, box)
        shape = extent(part_box)
        shift, width = 0, shape[-1]
        if suffix.endswith(".mask"):
            shift = box[-1][0] % 8
            shape = (*shape[:-1], mask_width(box[-1][1] - box[-1][0]))
        fields.append(Field(suffix, record.dtype, shape, offset, shift, width))
        size = record.dtype.itemsize
        for source, length in _box_runs(record.shape, part_box, size):
            runs.append(ByteRange(delta.header_size + record.begin + source, offset, length))
            offset += length
        offset = aligned(offset)
    return Transfer(0, offset, tuple(runs), (ModuleSlice(entry, box, 0, offset, tuple(fields), views),))


def _part_box(suffix: str, box: Box) -> Box:
    """The box of a part that belongs to a box of the module."""
    if suffix.endswith(".mask"):
        return (*box[:-1], (box[-1][0] // 8, mask_width(box[-1][1])))
    if suffix.endswith(".row"):
        return box[:-1]
    if suffix.endswith(".col"):
        return (*box[:-2], box[-1])
    if suffix.endswith(".scalar"):
        return ((0, 1),)
    return box


def _box_runs(shape: tuple[int, ...], box: Box, itemsize: int) -> Iterator[tuple[int, int]]:
    """(offset, length) in bytes of the contiguous ranges of a box inside a row-major tensor, in order."""
    inner = len(shape)
    while inner > 0 and box[inner - 1] == (0, shape[inner - 1]):
        inner -= 1
    # Dimensions from `inner` on are whole: a range covers them, and the range of the dimension before them.
    tail = math.prod(shape[inner:]) * itemsize
    if inner == 0:
        yield 0, tail
        return
    strides = [math.prod(shape[d + 1 :]) * itemsize for d in range(inner)]
    first, last = box[inner - 1]
    for index in itertools.product(*(range(a, b) for a, b in box[: inner - 1])):
        offset = sum(i * s for i, s in zip(index, strides, strict=False)) + first * strides[inner - 1]
        yield offset, (last - first) * tail


def _merged(transfers: Sequence[Transfer], limit: int) -> list[Transfer]:
    """Join consecutive boxed modules into transfers up to the limit."""
    out: list[Transfer] = []
    for transfer in transfers:
        last = out[-1] if out else None
        boxed = last is not None and not last.modules[0].is_whole and not transfer.modules[0].is_whole
        if last is not None and boxed and last.size + transfer.size <= limit:
            out[-1] = _joined(last, transfer)
        else:
            out.append(transfer)
    return out


def _joined(left: Transfer, right: Transfer) -> Transfer:
    by = left.size
    runs = tuple(ByteRange(run.source, run.target + by, run.size) for run in right.runs)
    modules = tuple(
        ModuleSlice(
            p.entry, p.box, p.begin + by, p.end + by,
            tuple(Field(f.suffix, f.dtype, f.shape, f.offset + by, f.shift, f.read_width) for f in p.fields),
            p.views,
        )
        for p in right.modules
    )  # fmt: skip
    return Transfer(left.begin, left.size + right.size, left.runs + runs, left.modules + modules)
