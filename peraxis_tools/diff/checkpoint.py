"""Compare base + delta with the fine-tuned checkpoint.

    d_A = sum of terms (or exact tensor - base)      d_B = fine-tuned - base      relative = ||d_A - d_B|| / ||d_B||

Norms are of the delta before its last rounding (SPEC 6.1); `identical` compares the weights after it, bit by bit. Where
a weight or its delta is not finite, equal bits count as no distance, and other bits leave the distance unknown. Rows
that the base lacks are in no norm; `changes` has the number of those that differ.

Tensors are read in blocks of rows; each base row is read once for both uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_tools.checkpoints.kinds import group_of
from peraxis_tools.deltas.rows import delta_rows, has_delta, restrict, row_blocks
from peraxis_tools.diff.result import ModuleDiff, relative_distance

__all__ = ["compare_with_checkpoint"]


@dataclass(slots=True)
class _Sums:
    square_a: float = 0.0
    square_b: float = 0.0
    square_distance: float = 0.0
    same_sign: int = 0
    changed: int = 0
    identical: bool = True
    changes: tuple[str, ...] = ()
    apart: bool = False  # a weight that is not finite differs


def compare_with_checkpoint(
    delta: pxd.DeltaFile, name: str, base: pxd.Safetensors, fine_tuned: pxd.Safetensors, *, alias: str | None = None
) -> ModuleDiff:
    """Compare one module with the fine-tuned tensor of its name, or of an alias of it.

    The caller has checked the base's names and shapes. relative is to the checkpoint's own delta (norm_b). Raises
    PayloadError, BindingError (E404).
    """
    shown = alias or name
    entry, found = delta.entry(name), fine_tuned[shown]
    if entry.base is not None:
        pxd.check_base_digest(entry, base.sha256(name))
    changes = tuple(
        f"{what} {a} -> {b}"
        for what, a, b in (
            ("dtype", entry.dtype.value, found.dtype.value),
            ("shape", "x".join(map(str, entry.shape)), "x".join(map(str, found.shape))),
        )
        if a != b
    )
    if changes:
        return ModuleDiff(name=shown, group=group_of(shown), identical=False, changes=changes, note="not comparable")
    module = delta.load(name)
    if not has_delta(module):
        same = bytes(pxd.raw_bytes(_exact(module, name, base))) == bytes(pxd.raw_bytes(fine_tuned.read(shown)))
        return ModuleDiff(name=shown, group=group_of(shown), identical=same, note="has no delta: compared bit by bit")
    sums = _sums(module, base, fine_tuned, wanted=shown)
    norm_b = math.sqrt(sums.square_b)
    distance = None if sums.apart else math.sqrt(sums.square_distance)
    return ModuleDiff(
        name=shown,
        group=group_of(shown),
        identical=sums.identical,
        changes=sums.changes,
        sign_agreement=sums.same_sign / sums.changed if sums.changed and module.components else None,
        norm_a=math.sqrt(sums.square_a),
        norm_b=norm_b,
        distance=distance,
        relative=relative_distance(distance, norm_b),
        note="a weight that is not finite differs" if sums.apart else None,
    )


def _exact(module: pxd.ModuleDelta, name: str, base: pxd.Safetensors) -> pxd.Array:
    return pxd.reconstruct(module, None if module.full is not None else base.read(name))


def _sums(module: pxd.ModuleDelta, base: pxd.Safetensors, fine_tuned: pxd.Safetensors, *, wanted: str) -> _Sums:
    """wanted: the name of the fine-tuned tensor."""
    if module.base is None:
        raise pxd.ShapeError(f"{module.name}: has no base tensor")
    sums = _Sums()
    for rows in row_blocks(module.covered):
        chosen = rows if module.shape else None
        base_block = base.read(module.name, chosen)
        wanted_block = fine_tuned.read(wanted, chosen)
        restricted = restrict(module, rows) if module.shape else module
        rebuilt = pxd.reconstruct(restricted, base_block)
        sums.identical &= np.array_equal(_bits(rebuilt), _bits(wanted_block))
        plain = pxd.to_float32(base_block, module.base.dtype)
        with np.errstate(invalid="ignore"):
            delta_b = (pxd.to_float32(wanted_block, module.dtype) - plain).reshape(-1).astype(np.float64)
            delta_a = delta_rows(module, rows, lambda _, plain=plain: plain).reshape(-1).astype(np.float64)  # type: ignore[misc]
        if not (math.isfinite(delta_a @ delta_a + delta_b @ delta_b) and _finite(rebuilt, module.dtype)):
            sums.apart |= _settle_odd(delta_a, delta_b, rebuilt, wanted_block, module.dtype)
        sums.square_a += float(delta_a @ delta_a)
        sums.square_b += float(delta_b @ delta_b)
        sums.square_distance += float(np.square(delta_a - delta_b).sum())
        changed = delta_b != 0.0
        sums.changed += int(np.count_nonzero(changed))
        sums.same_sign += int(np.count_nonzero(((delta_a > 0.0) == (delta_b > 0.0)) & changed))
    if module.shape and module.kept < module.shape[0]:
        tail = module.full[module.kept :] if module.full is not None else module.tail
        new = module.shape[0] - module.kept
        rest = fine_tuned.read(wanted, slice(module.kept, module.shape[0]))
        different = int(np.any(_bits(tail).reshape(new, -1) != _bits(rest).reshape(new, -1), axis=1).sum())
        if different:
            sums.identical, sums.changes = False, (f"{different} of {new} new rows differ",)
    return sums


def _finite(array: pxd.Array, dtype: pxd.DType) -> bool:
    return bool(np.isfinite(pxd.to_float32(array, dtype)).all())


def _settle_odd(
    delta_a: NDArray[np.float64],
    delta_b: NDArray[np.float64],
    rebuilt: pxd.Array,
    wanted: pxd.Array,
    dtype: pxd.DType,
) -> bool:
    """Set both deltas to zero where one is not finite. Returns whether a weight there differs."""
    equal = np.all(_bits(rebuilt).reshape(delta_a.size, -1) == _bits(wanted).reshape(delta_a.size, -1), axis=1)
    odd = ~(np.isfinite(delta_a) & np.isfinite(delta_b) & np.isfinite(pxd.to_float32(rebuilt, dtype).reshape(-1)))
    delta_a[odd], delta_b[odd] = 0.0, 0.0
    return bool(np.any(odd & ~equal))


def _bits(array: pxd.Array | None) -> pxd.Array:
    if array is None:
        return np.empty(0, np.uint8)
    return np.frombuffer(pxd.raw_bytes(array), np.uint8)
