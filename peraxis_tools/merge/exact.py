"""Merge tensors that are exact in an input.

    merged = base + sum w_i (tensor_i - base)        rounded to binary32, and then to the dtype

Rows without a base have no delta: they become the weighted mean of the inputs' rows. Rows that are equal in all inputs
are copied. Blocks of rows are summed in binary64; other methods than sums give their deltas in binary32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_tools.deltas.rows import BaseRows, has_delta, row_blocks
from peraxis_tools.errors import ToolError
from peraxis_tools.merge.fit import AnyDense
from peraxis_tools.merge.methods import SUM_MIN

__all__ = ["merge_exact", "merge_tails"]


def merge_exact(
    modules: Sequence[pxd.ModuleDelta],
    weights: Sequence[float],
    *,
    plain: bool,
    base: BaseRows | None,
    mixed: Callable[[], AnyDense],
) -> pxd.ModuleDelta:
    """One `full` module from modules of one name, of which at least one is `full`.

    plain: whether the merge is the weighted sum with these weights. mixed: the merged delta by rows, read only if the
    base is needed. Raises ToolError if it is needed and missing, or if the tensors cannot be averaged.
    """
    kept = _untouched(modules, weights) if plain else _same_everywhere(modules, weights)
    if kept is not None:
        return kept
    first = modules[0]
    if not first.dtype.is_float:
        raise ToolError(f"{first.name}: is {first.dtype.value} and differs between the inputs; it cannot be averaged")
    out = np.empty(first.shape, first.dtype.storage)
    covered = 0
    if has_delta(first):
        if base is None:
            raise ToolError(f"{first.name}: is an exact tensor, whose weighted delta needs base (--base)")
        covered = first.kept if first.shape else 1
        rows_of = mixed()
        for rows in row_blocks(first.covered):
            block = base(rows).astype(np.float64) + rows_of(rows)
            out[rows if first.shape else ...] = _rounded(block, first.dtype, first.name)
    if first.shape and covered < first.shape[0]:
        out[covered:] = _mean([_rows_beyond(module, covered) for module in modules], weights, first.dtype, first.name)
    return replace(first, encoding=pxd.Encoding.FULL, components=(), full=out, tail=None)


def merge_tails(modules: Sequence[pxd.ModuleDelta], weights: Sequence[float]) -> pxd.Array | None:
    """The rows beyond the base of modules that are not `full`; None if there are none."""
    tails = [module.tail for module in modules if module.tail is not None]
    return _mean(tails, weights, modules[0].dtype, modules[0].name) if tails else None


def _rows_beyond(module: pxd.ModuleDelta, covered: int) -> pxd.Array:
    tail = module.full[covered:] if module.full is not None else module.tail
    if tail is None:
        raise pxd.ShapeError(f"{module.name}: has no rows beyond the base")
    return tail


def _untouched(modules: Sequence[pxd.ModuleDelta], weights: Sequence[float]) -> pxd.ModuleDelta | None:
    """The input that equals the weighted sum: the only delta, with weight 1, or one of several with equal bytes."""
    moving = [(m, w) for m, w in zip(modules, weights, strict=True) if m.encoding is not pxd.Encoding.SAME and w != 0.0]
    if not moving or not _all_equal([m for m, _ in moving]) or not math.isclose(math.fsum(w for _, w in moving), 1.0):
        return None
    first = moving[0][0]
    beyond = first.shape and first.kept < first.shape[0]
    return first if first.full is not None and (not beyond or _all_equal(modules)) else None


def _same_everywhere(modules: Sequence[pxd.ModuleDelta], weights: Sequence[float]) -> pxd.ModuleDelta | None:
    return modules[0] if len(modules) == 1 and weights[0] == 1.0 else None


def _all_equal(modules: Sequence[pxd.ModuleDelta]) -> bool:
    first = modules[0].full
    return first is not None and all(
        module.full is not None and pxd.raw_bytes(module.full) == pxd.raw_bytes(first) for module in modules[1:]
    )


def _mean(arrays: Sequence[pxd.Array], weights: Sequence[float], dtype: pxd.DType, name: str) -> pxd.Array:
    if all(pxd.raw_bytes(array) == pxd.raw_bytes(arrays[0]) for array in arrays[1:]):
        return arrays[0]
    total = math.fsum(weights)
    # With weights of both signs, a weighted mean may lie far outside the range of its inputs.
    if not dtype.is_float or abs(total) <= SUM_MIN or min(weights) < 0.0 < max(weights):
        shown = ", ".join(f"{weight:g}" for weight in weights)
        raise ToolError(f"{name}: has rows that the base lacks, which have no mean with the weights {shown}")
    out: NDArray[np.generic] = np.empty(arrays[0].shape, dtype.storage)
    for rows in row_blocks(arrays[0].shape):
        block = sum(
            weight / total * pxd.to_float32(array[rows], dtype).astype(np.float64)
            for array, weight in zip(arrays, weights, strict=True)
        )
        out[rows] = _rounded(np.asarray(block), dtype, name)
    return out


def _rounded(block: NDArray[np.float64], dtype: pxd.DType, name: str) -> pxd.Array:
    """Round to the dtype. Raises ToolError for a finite number that is not finite in it."""
    with np.errstate(over="ignore"):
        stored = pxd.from_float32(block.astype(np.float32), dtype)
    if np.any(np.isfinite(block) & ~np.isfinite(pxd.to_float32(stored, dtype))):
        largest = np.abs(block[np.isfinite(block)]).max()
        raise ToolError(f"{name}: a number of the sum is {largest:g}, too large for {dtype.value}; lower the weights")
    return stored
