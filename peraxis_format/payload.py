"""Build a module from bytes of a file, and check it by steps 10 and 11 of SPEC 8 (bits, pads, scales, blocks)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeAlias

import numpy as np

from peraxis_format.bits import unused_bits_are_zero
from peraxis_format.container import TensorRecord
from peraxis_format.delta import Component, Encoding, ModuleDelta
from peraxis_format.dtypes import Array
from peraxis_format.errors import fail
from peraxis_format.manifest import ModuleEntry
from peraxis_format.ops.exact import check as check_exact

__all__ = ["assemble", "build_module", "check_pad", "check_stored_values", "check_values"]

# Returns bytes [begin, end) of the data.
Reader: TypeAlias = Callable[[int, int], bytes | memoryview]

_BLOCK: Final = 1 << 19


def _view(buffer: memoryview, record: TensorRecord, begin: int) -> Array:
    """A zero-copy storage array of one tensor; buffer[0] is byte `begin` of the data."""
    flat = np.frombuffer(buffer[record.begin - begin : record.end - begin], record.dtype.storage)
    return flat.reshape(record.dtype.storage_shape(record.shape))


def build_module(entry: ModuleEntry, records: Iterable[TensorRecord], buffer: memoryview, begin: int) -> ModuleDelta:
    """Assemble a module from views of its range; buffer[0] is byte `begin` of the data."""
    return assemble(entry, {record.name[len(entry.name) + 1 :]: _view(buffer, record, begin) for record in records})


def assemble(entry: ModuleEntry, arrays: Mapping[str, Array], shape: tuple[int, ...] | None = None) -> ModuleDelta:
    """A module from its parts, named by their suffixes (SPEC 4.1). shape: that of a box, if it is not whole."""
    base = entry.base
    components = tuple(
        Component(
            axis=component.axis,
            exponent=component.exponent,
            mask=arrays[f"{k}.mask"],
            row=arrays.get(f"{k}.row"),
            col=arrays.get(f"{k}.col"),
            scalar=arrays.get(f"{k}.scalar"),
        )
        for k, component in enumerate(entry.components)
    )
    return ModuleDelta(
        name=entry.name,
        shape=entry.shape if shape is None else shape,
        dtype=entry.dtype,
        encoding=entry.encoding,
        base=base if base is None or shape is None else replace(base, shape=shape),
        components=components,
        full=arrays.get("full"),
        index=arrays.get("index"),
        data=arrays.get("data"),
        result=entry.result,
        tail=arrays.get("tail"),
    )


def check_pad(data: bytes, name: str, offset: int) -> None:
    """Check that a pad is zero (SPEC 4.5). offset: its place in the file."""
    if any(data):
        fail("E304", field=name, offset=offset)


def check_values(module: ModuleDelta) -> None:
    """Check unused mask bits (SPEC 5.2), scales (5.4) and exact blocks (5.7)."""
    if module.index is not None and module.data is not None:
        check_exact(module.index, module.data, math.prod(module.covered), module.dtype, field=module.name)
    if module.encoding is not Encoding.SIGN:
        return
    for k, component in enumerate(module.components):
        _check_mask(component.mask, module.shape[-1], f"{module.name}.{k}.mask")
    for k, component in enumerate(module.components):
        for name, scale in component.scales().items():
            _check_scale(scale, f"{module.name}.{k}.{name}")


def check_stored_values(entry: ModuleEntry, records: Sequence[TensorRecord], read: Reader) -> None:
    """`check_values` for a module in a file, in blocks of rows; masks without unused bits are not read.

    read(begin, end) returns those bytes of the data.
    """
    if entry.encoding is Encoding.EXACT:
        index, blocks = (np.frombuffer(read(r.begin, r.end), r.dtype.storage) for r in records[:2])
        weights = math.prod(entry.shape) - sum(math.prod(tail.shape) for tail in records[2:])
        check_exact(index, blocks, weights, entry.dtype, field=entry.name)
    if entry.encoding is not Encoding.SIGN:
        return
    for record in records if entry.shape[-1] % 8 else ():
        if record.name.endswith(".mask"):
            width = record.shape[-1]
            step = max(1, _BLOCK // width) * width
            for begin in range(record.begin, record.end, step):
                data = read(begin, min(begin + step, record.end))
                _check_mask(np.frombuffer(data, np.uint8).reshape(-1, width), entry.shape[-1], record.name)
    for record in records:
        if record.name.endswith((".row", ".col", ".scalar")):
            _check_scale(np.frombuffer(read(record.begin, record.end), np.uint16), record.name)


def _check_mask(mask: Array, d_in: int, name: str) -> None:
    if not unused_bits_are_zero(mask, d_in):
        fail("E303", field=name)


def _check_scale(scale: Array, name: str) -> None:
    bits = scale.view(np.uint16)
    # Without the sign bit, F16 patterns from 0x7C00 on are infinity and NaN.
    if np.any((bits & np.uint16(0x7FFF)) >= np.uint16(0x7C00)):
        fail("E305", field=name)
    if np.any(bits >> np.uint16(15)):
        fail("E306", field=name)
