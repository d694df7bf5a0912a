"""Compare one module of two deltas: from packed masks if both are `sign`, else from rows of exact tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_tools.checkpoints.kinds import axes_text, group_of
from peraxis_tools.deltas.rows import BaseRows, delta_rows, has_delta, row_blocks
from peraxis_tools.diff.packed import InnerProducts, PackedComponent, inner_products, magnitude, square
from peraxis_tools.diff.result import NEEDS_BASE, ModuleDiff, relative_distance
from peraxis_tools.diff.stream import checked_blocks, packed_components

__all__ = ["compare_modules"]

_SMALL = 1 << 20  # bytes of a module


@dataclass(frozen=True, slots=True)
class _Measure:
    """The measures of a pair of modules; None if unknown. scale: the mean |first component| of B divided by A's."""

    products: InnerProducts | None = None
    scale: float | None = None
    distance: float | None = None
    note: str | None = None


def _entry_changes(a: pxd.ModuleEntry, b: pxd.ModuleEntry) -> tuple[str, ...]:
    """The differences of two entries of one name, without digests."""
    pairs = {
        "encoding": (a.encoding.value, b.encoding.value),
        "axis": (_axes(a), _axes(b)),
        "dtype": (a.dtype.value, b.dtype.value),
        "shape": ("x".join(map(str, a.shape)), "x".join(map(str, b.shape))),
    }
    return tuple(f"{what} {x or 'none'} -> {y or 'none'}" for what, (x, y) in pairs.items() if x != y)


def _axes(entry: pxd.ModuleEntry) -> str:
    return axes_text(component.axis.value for component in entry.components)


def compare_modules(a: pxd.DeltaFile, b: pxd.DeltaFile, name: str, base: BaseRows | None) -> ModuleDiff:
    """Compare one module that both files have, on the same base tensor.

    The digests of both payloads are checked. Raises PayloadError.
    """
    entry_a, entry_b = a.entry(name), b.entry(name)
    if entry_a == entry_b:
        a.check(name)
        b.check(name)
        return _identical(a, name, base)
    if _equal_weights(a, b, name, base):
        return replace(_identical(a, name, base), changes=_entry_changes(entry_a, entry_b))
    measure = _measure(a, b, name, base)
    found = measure.products
    norm_a = None if found is None else math.sqrt(found.square_a)
    return ModuleDiff(
        name=name,
        group=group_of(name),
        identical=False,
        changes=(*_entry_changes(entry_a, entry_b), *_new_rows(a, b, name)),
        sign_agreement=None if found is None else found.agreement,
        scale_change=measure.scale,
        norm_a=norm_a,
        norm_b=None if found is None else math.sqrt(found.square_b),
        distance=measure.distance,
        relative=relative_distance(measure.distance, norm_a),
        note=measure.note,
    )


def _equal_weights(file_a: pxd.DeltaFile, file_b: pxd.DeltaFile, name: str, base: BaseRows | None) -> bool:
    """Whether both store the same weights without loss, bit for bit. `same` is compared only if the base is known.

    The digests of equal ones are checked.
    """
    a, b = file_a.entry(name), file_b.entry(name)
    stored = sorted(entry.encoding.value for entry in (a, b))
    if (a.dtype, a.shape) != (b.dtype, b.shape) or stored not in (["full", "full"], ["full", "same"]):
        return False
    if stored == ["full", "same"] and (base is None or not has_delta(a) or not has_delta(b)):
        return False
    modules = sorted((_module(file_a, name), _module(file_b, name)), key=lambda module: module.encoding.value)
    if stored == ["full", "full"]:
        equal = _equal_bytes(*(module.full for module in modules))
    else:
        equal = base is not None and _is_base(modules[0], base)
    if equal:
        file_a.check(name)
        file_b.check(name)
    return equal


def _is_base(module: pxd.ModuleDelta, base: BaseRows) -> bool:
    """Whether a `full` module has no new rows, and the base's weights, rounded once to its dtype (SPEC 6.3)."""
    if module.full is None or (module.shape and module.kept < module.shape[0]):
        return False
    blocks = ((rows, module.full[rows] if module.shape else module.full) for rows in row_blocks(module.shape))
    return all(_equal_bytes(block, pxd.from_float32(base(rows), module.dtype)) for rows, block in blocks)


def _equal_bytes(a: pxd.Array | None, b: pxd.Array | None) -> bool:
    if a is None or b is None:
        return False
    left, right = (np.frombuffer(pxd.raw_bytes(array), np.uint8) for array in (a, b))
    return np.array_equal(left, right)


def _identical(file: pxd.DeltaFile, name: str, base: BaseRows | None) -> ModuleDiff:
    entry = file.entry(name)
    norm = None
    if entry.encoding is not pxd.Encoding.FULL:
        norm = math.sqrt(square(packed_components(file, name)))
    elif base is not None and has_delta(entry):
        module = file.load(name)
        norm = math.sqrt(_dense_products(module, module, base).square_a)
    return ModuleDiff(
        name=name,
        group=group_of(name),
        identical=True,
        sign_agreement=1.0 if entry.components else None,
        scale_change=1.0 if entry.components else None,
        norm_a=norm,
        norm_b=norm,
        distance=0.0,
        relative=0.0,
    )


def _measure(file_a: pxd.DeltaFile, file_b: pxd.DeltaFile, name: str, base: BaseRows | None) -> _Measure:
    a, b = file_a.entry(name), file_b.entry(name)
    comparable = a.shape == b.shape and a.dtype.is_float and b.dtype.is_float
    streamed = comparable and len(a.components) == 1 == len(b.components)
    if not streamed:
        file_a.check(name)
        file_b.check(name)
    if not comparable:
        return _Measure(note="of another shape" if a.shape != b.shape else "not of a float type")
    if pxd.Encoding.FULL not in (a.encoding, b.encoding):
        packed = packed_components(file_a, name), packed_components(file_b, name)
        found = inner_products(*packed, checked_blocks(file_a, file_b, name) if streamed else None)
        return _Measure(found, _scale(*packed), math.sqrt(found.square_distance))
    if has_delta(a) and has_delta(b) and base is not None:
        found = _dense_products(_module(file_a, name), _module(file_b, name), base)
        return _Measure(found, distance=math.sqrt(found.square_distance))
    note = NEEDS_BASE if has_delta(a) and has_delta(b) else "has no base tensor"
    whole_a, whole_b = (_module(file, name) for file in (file_a, file_b))
    if whole_a.full is None or whole_b.full is None:
        return _Measure(note=note)
    # Both deltas are fine-tuned minus the same base: it cancels in the distance, but not in the norms.
    covered = slice(0, min(whole_a.kept, whole_b.kept))
    full_a, full_b = (x[covered] if x.shape else x for x in (whole_a.full, whole_b.full))
    return _Measure(distance=math.sqrt(_square_difference(full_a, a.dtype, full_b, b.dtype)), note=note)


def _module(file: pxd.DeltaFile, name: str) -> pxd.ModuleDelta:
    """A module. A small one is read instead of mapped, because one page of a map can load megabytes around it."""
    return file.load(name) if file.payload_bytes(name) <= _SMALL else file[name]


def _scale(a: Sequence[PackedComponent], b: Sequence[PackedComponent]) -> float | None:
    before, after = (magnitude(components[0]) if components else 0.0 for components in (a, b))
    return after / before if before > 0.0 and b else None


def _new_rows(file_a: pxd.DeltaFile, file_b: pxd.DeltaFile, name: str) -> tuple[str, ...]:
    """A note if rows beyond the base differ. They have no delta, so no distance or norm includes them."""
    tails = [_tail_rows(file[name]) for file in (file_a, file_b)]
    if tails[0] is None or tails[1] is None or tails[0].shape != tails[1].shape or tails[0].dtype != tails[1].dtype:
        return ()
    different = int(np.any(tails[0] != tails[1], axis=1).sum())
    return (f"{different} of {len(tails[0])} new rows differ",) if different else ()


def _tail_rows(module: pxd.ModuleDelta) -> pxd.Array | None:
    """The rows beyond the base, [rows, -1], as bits for a packed type; None if there are none."""
    count = module.shape[0] - module.kept if module.shape else 0
    held = module.tail if module.full is None else module.full
    if count == 0 or held is None:
        return None
    if module.dtype.is_packed:
        bits = np.unpackbits(held, bitorder="little")
        return bits[-count * module.dtype.bits * math.prod(module.shape[1:]) :].reshape(count, -1)
    return held[-count:].reshape(count, -1)


def _square_difference(a: pxd.Array, dtype_a: pxd.DType, b: pxd.Array, dtype_b: pxd.DType) -> float:
    total = 0.0
    for rows in row_blocks(a.shape):
        block_a, block_b = (a[rows], b[rows]) if a.shape else (a, b)
        difference = pxd.to_float32(block_a, dtype_a).astype(np.float64) - pxd.to_float32(block_b, dtype_b)
        total += float(np.vdot(difference, difference))
    return total


def _dense_products(a: pxd.ModuleDelta, b: pxd.ModuleDelta, base: BaseRows) -> InnerProducts:
    square_a = square_b = inner = 0.0
    for rows in row_blocks(a.covered):
        block_a = _flat(delta_rows(a, rows, base))
        block_b = block_a if a is b else _flat(delta_rows(b, rows, base))
        square_a += float(block_a @ block_a)
        square_b += float(block_b @ block_b)
        inner += float(block_a @ block_b)
    return InnerProducts(square_a=square_a, square_b=square_b, inner=inner)


def _flat(block: NDArray[np.float32]) -> NDArray[np.float64]:
    return block.reshape(-1).astype(np.float64)
