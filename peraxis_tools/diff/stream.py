"""Read a file's components by rows on demand, without a whole mask in memory and without mapping the file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_tools.diff.packed import Block, PackedComponent, pack, row_step

__all__ = ["checked_blocks", "packed_components"]


def packed_components(file: pxd.DeltaFile, name: str) -> list[PackedComponent]:
    """A module's components, whose masks are read from the file on demand; empty if it is not `sign`.

    Digests are not checked here.
    """
    entry = file.entry(name)
    records = {record.name: record for record in file.tensors(name)}
    found = []
    for k, component in enumerate(entry.components):
        mask = records[f"{name}.{k}.mask"]
        scales = {
            suffix: _read(file, records[f"{name}.{k}.{suffix}"])
            for suffix in ("row", "col", "scalar")
            if f"{name}.{k}.{suffix}" in records
        }
        covered = (pxd.kept_rows(entry.shape, entry.base.shape), *entry.shape[1:]) if entry.base else entry.shape
        found.append(pack(component.exponent, scales, covered, _mask_rows(file, mask)))
    return found


def checked_blocks(a: pxd.DeltaFile, b: pxd.DeltaFile, name: str) -> Iterator[Block]:
    """The rows of both masks of a module with one component in each file; both digests are checked after the last.

    A component's mask is first in its range (SPEC 4.1), so one pass over the bytes serves digest and sums. A block is
    valid until the next one. Raises PayloadError.
    """
    width = a.tensors(name)[0].shape[-1]
    size = width * row_step(a.entry(name).shape[-1])
    left = math.prod(a.tensors(name)[0].shape)
    for pair in itertools.zip_longest(a.chunks(name, size=size), b.chunks(name, size=size), fillvalue=b""):
        count = min(left, size)
        left -= count
        if count:
            masks = [np.frombuffer(chunk, np.uint8, count).reshape(-1, width) for chunk in pair]
            yield masks[0], masks[1]


def _read(file: pxd.DeltaFile, record: pxd.TensorRecord) -> NDArray[Any]:
    data = file.read(file.header_size + record.begin, record.end - record.begin)
    return np.frombuffer(data, record.dtype.storage).reshape(record.dtype.storage_shape(record.shape))


def _mask_rows(file: pxd.DeltaFile, record: pxd.TensorRecord) -> Callable[[int, int], NDArray[np.uint8]]:
    width = record.shape[-1]
    first = file.header_size + record.begin

    def rows(begin: int, end: int) -> NDArray[np.uint8]:
        data = file.read(first + begin * width, (end - begin) * width)
        return np.frombuffer(data, np.uint8).reshape(end - begin, width)

    return rows
