"""One module of two deltas: measured from the packed form where both are `sign`, else from rows of exact tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_tools.diff.packed import Moments, magnitude, moments, square
from peraxis_tools.diff.result import ModuleDiff, relative_distance
from peraxis_tools.diff.stream import checked_blocks, packed_components
from peraxis_tools.kinds import subtype_of
from peraxis_tools.rows import BaseRows, delta_rows, has_delta, row_blocks

__all__ = ["compare_modules", "entry_changes"]

_NEEDS_BASE = "stored exactly; pass --base for its delta"


@dataclass(frozen=True, slots=True)
class _Measure:
    """What a pair of modules comes to; None where it cannot be told."""

    moments: Moments | None = None
    distance: float | None = None
    note: str | None = None


def entry_changes(a: pxd.ModuleEntry, b: pxd.ModuleEntry) -> tuple[str, ...]:
    """What two entries of one name say differently, but for digests."""
    pairs = {
        "encoding": (a.encoding.value, b.encoding.value),
        "axis": (_axes(a), _axes(b)),
        "dtype": (a.dtype.value, b.dtype.value),
        "shape": ("x".join(map(str, a.shape)), "x".join(map(str, b.shape))),
    }
    return tuple(f"{what} {x or 'none'} -> {y or 'none'}" for what, (x, y) in pairs.items() if x != y)


def _axes(entry: pxd.ModuleEntry) -> str:
    return " ".join(component.axis.value for component in entry.components)


def compare_modules(a: pxd.DeltaFile, b: pxd.DeltaFile, name: str, base: BaseRows | None) -> ModuleDiff:
    """One module that both files have, on the same base tensor.

    Payloads are held to their digests; what is equal in both is read from A alone. Raises PayloadError.
    """
    entry_a, entry_b = a.entry(name), b.entry(name)
    if entry_a == entry_b:
        a.check(name)
        return _identical(a, name, base)
    measure = _measure(a, b, name, base)
    scale = None
    if entry_a.components and entry_b.components:
        before, after = (magnitude(packed_components(file, name)[0]) for file in (a, b))
        scale = after / before if before > 0.0 else None
    found = measure.moments
    norm_a = None if found is None else math.sqrt(found.square_a)
    return ModuleDiff(
        name=name,
        subtype=subtype_of(name),
        identical=False,
        changes=entry_changes(entry_a, entry_b),
        sign_agreement=None if found is None else found.agreement,
        scale_change=scale,
        norm_a=norm_a,
        norm_b=None if found is None else math.sqrt(found.square_b),
        distance=measure.distance,
        relative=relative_distance(measure.distance, norm_a),
        note=measure.note,
    )


def _identical(file: pxd.DeltaFile, name: str, base: BaseRows | None) -> ModuleDiff:
    entry = file.entry(name)
    norm = None
    if entry.encoding is not pxd.Encoding.FULL:
        norm = math.sqrt(square(packed_components(file, name)))
    elif base is not None and has_delta(entry):
        module = file.load(name)
        norm = math.sqrt(_dense_moments(module, module, base).square_a)
    return ModuleDiff(
        name=name,
        subtype=subtype_of(name),
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
    if comparable and len(a.components) == 1 == len(b.components):
        blocks = checked_blocks(file_a, file_b, name)
        found = moments(packed_components(file_a, name), packed_components(file_b, name), blocks)
        return _with_tails(found, file_a, file_b, name)
    file_a.check(name)
    file_b.check(name)
    if not comparable:
        return _Measure(note="of another shape" if a.shape != b.shape else "not of a float type")
    if pxd.Encoding.FULL not in (a.encoding, b.encoding):
        found = moments(packed_components(file_a, name), packed_components(file_b, name))
        return _with_tails(found, file_a, file_b, name)
    if has_delta(a) and has_delta(b) and base is not None:
        return _with_tails(_dense_moments(file_a[name], file_b[name], base), file_a, file_b, name)
    full_a, full_b = file_a[name].full, file_b[name].full
    if full_a is not None and full_b is not None:
        # fine-tuned minus base, twice, with the same base: the base cancels out of the distance, not out of the norms.
        return _Measure(distance=math.sqrt(_square_difference(full_a, a.dtype, full_b, b.dtype)), note=_NEEDS_BASE)
    return _Measure(note=_NEEDS_BASE if has_delta(a) and has_delta(b) else "has no base tensor")


def _with_tails(found: Moments, file_a: pxd.DeltaFile, file_b: pxd.DeltaFile, name: str) -> _Measure:
    """Rows beyond the base have no delta: they count in the distance and in neither norm."""
    tails = [(_tail(file[name]), file.entry(name).dtype) for file in (file_a, file_b)]
    (tail_a, dtype_a), (tail_b, dtype_b) = tails
    extra = 0.0
    if tail_a is not None and tail_b is not None:
        extra = _square_difference(tail_a, dtype_a, tail_b, dtype_b)
    return _Measure(found, math.sqrt(found.square_distance + extra))


def _tail(module: pxd.ModuleDelta) -> pxd.Array | None:
    if module.full is not None and module.shape:
        return module.full[module.kept :] if module.kept < module.shape[0] else None
    return module.tail


def _square_difference(a: pxd.Array, dtype_a: pxd.DType, b: pxd.Array, dtype_b: pxd.DType) -> float:
    total = 0.0
    for rows in row_blocks(a.shape):
        part_a, part_b = (a[rows], b[rows]) if a.shape else (a, b)
        difference = pxd.to_float32(part_a, dtype_a).astype(np.float64) - pxd.to_float32(part_b, dtype_b)
        total += float(np.vdot(difference, difference))
    return total


def _dense_moments(a: pxd.ModuleDelta, b: pxd.ModuleDelta, base: BaseRows) -> Moments:
    square_a = square_b = inner = 0.0
    for rows in row_blocks(a.covered):
        block_a = _flat(delta_rows(a, rows, base))
        block_b = block_a if a is b else _flat(delta_rows(b, rows, base))
        square_a += float(block_a @ block_a)
        square_b += float(block_b @ block_b)
        inner += float(block_a @ block_b)
    return Moments(square_a=square_a, square_b=square_b, inner=inner)


def _flat(block: NDArray[np.float32]) -> NDArray[np.float64]:
    return block.reshape(-1).astype(np.float64)
