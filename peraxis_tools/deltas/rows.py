"""Modules in blocks of rows, so that a verb can use the dense delta of a matrix that would not fit in memory.

A block is a range of the first dimension: rows of a matrix, or whole experts of a fused stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd

__all__ = ["BaseRows", "base_rows", "delta_rows", "difference", "has_delta", "restrict", "row_blocks"]

Floats = TypeVar("Floats", NDArray[np.float32], NDArray[np.float64])
_BLOCK_ELEMENTS: Final = 1 << 20  # 4 MiB of binary32 for each array of a block

# Reads rows of a module's base tensor as binary32.
BaseRows: TypeAlias = Callable[[slice], NDArray[np.float32]]


def row_blocks(shape: tuple[int, ...], *, elements: int = _BLOCK_ELEMENTS) -> Iterator[slice]:
    """Ranges of the first dimension of about `elements` elements each, in order; at least one."""
    if not shape:
        yield slice(0, 1)
        return
    step = max(1, elements // max(1, math.prod(shape[1:])))
    for begin in range(0, shape[0], step):
        yield slice(begin, min(begin + step, shape[0]))


def restrict(module: pxd.ModuleDelta, rows: slice) -> pxd.ModuleDelta:
    """The module over a range of its covered rows, as views, without its tail.

    Laws: reconstruct(restrict(m, rows), base[rows]) == reconstruct(m, base)[rows], and so for dense_delta.
    """
    count = rows.stop - rows.start
    batched = len(module.shape) > 2
    return replace(
        module,
        shape=(count, *module.shape[1:]),
        base=None if module.base is None else replace(module.base, shape=(count, *module.base.shape[1:])),
        components=tuple(
            replace(
                component,
                mask=component.mask[rows],
                row=None if component.row is None else component.row[rows],
                # A matrix has one col vector for all rows; a stack has one for each matrix.
                col=component.col[rows] if batched and component.col is not None else component.col,
            )
            for component in module.components
        ),
        full=None if module.full is None else module.full[rows],
        tail=None,
    )


def has_delta(module: pxd.ModuleDelta | pxd.ModuleEntry) -> bool:
    """Whether fine-tuned minus base is defined: float tensors whose shapes differ at most in the first dimension."""
    base = module.base
    return (
        base is not None
        and module.dtype.is_float
        and base.dtype.is_float
        and len(base.shape) == len(module.shape)
        and base.shape[1:] == module.shape[1:]
    )


def base_rows(base: pxd.Safetensors, entry: pxd.ModuleEntry) -> BaseRows:
    """A function that reads a module's base tensor by rows; the caller has checked names, dtypes and shapes.

    Checks the tensor's digest first. Raises BindingError (E404).
    """
    if entry.base is None:
        raise pxd.ShapeError(f"{entry.name}: has no base tensor")
    pxd.check_base_digest(entry, base.sha256(entry.name))
    dtype = entry.base.dtype
    whole = not entry.base.shape
    return lambda rows: pxd.to_float32(base.read(entry.name, None if whole else rows), dtype)


def delta_rows(module: pxd.ModuleDelta, rows: slice, base: BaseRows | None) -> NDArray[np.float32]:
    """Fine-tuned minus base over covered rows, binary32 [rows, ...]: the exact sum for `sign`, zeros for `same`.

    base is read for `full` alone. Raises ShapeError if it is needed and missing.
    """
    if module.encoding is pxd.Encoding.SIGN:
        return pxd.dense_delta(restrict(module, rows))
    if module.encoding is pxd.Encoding.SAME:
        return np.zeros((rows.stop - rows.start, *module.shape[1:]) if module.shape else (), np.float32)
    if base is None or module.full is None:
        raise pxd.ShapeError(f"{module.name}: has the encoding `full`; its delta needs the base")
    return difference(pxd.to_float32(module.full[rows] if module.shape else module.full, module.dtype), base(rows))


def difference(new: Floats, old: Floats) -> Floats:
    """new - old, with 0 for equal infinities."""
    with np.errstate(invalid="ignore"):
        return np.where(new == old, new.dtype.type(0), new - old)
