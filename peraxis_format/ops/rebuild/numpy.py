"""rebuild in numpy, the reference: SPEC 6.1 and 6.2 literally.

Blocks of rows keep the memory beyond input and output at a few MiB.
Rejected: `np.where(sign, +s, -s)`, which reads two arrays; here the sign bit of the scale is flipped instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from peraxis_format.bits import unpack_signs
from peraxis_format.delta import ComponentFactors
from peraxis_format.dtypes import Array, DType, from_float32, to_float32

__all__ = ["add_components", "rebuild"]

_BLOCK_ELEMENTS = 1 << 18  # 1 MiB of binary32: a block and its temporaries stay in the second-level cache


def _term(component: ComponentFactors, rows: slice) -> NDArray[np.float32]:
    """The term of SPEC 5.3 for a block of rows: binary32 [rows, d_in]."""
    size = component.row[rows, None] if component.plain else component.row[rows, None] * component.col
    # b = -1 flips the sign bit of the scale, which is set only where a merge has folded in a negative weight.
    flipped = (~unpack_signs(component.mask[rows], len(component.col))).astype(np.uint32)
    flipped <<= np.uint32(31)
    flipped ^= size.view(np.uint32)
    return flipped.view(np.float32)


def rebuild(
    matrices: Sequence[Sequence[ComponentFactors]], base: Array, out: Array, *, base_dtype: DType, dtype: DType
) -> None:
    """out = base + components. Arguments: see rebuild."""
    with np.errstate(over="ignore", invalid="ignore"):
        for index, rows, components in _row_blocks(matrices, out.shape):
            # `+` copies, because to_float32 may return a view of the base.
            total = to_float32(base[index][rows], base_dtype)
            for component in components:
                total = total + _term(component, rows)
            out[index][rows] = from_float32(total, dtype)


def add_components(matrices: Sequence[Sequence[ComponentFactors]], total: NDArray[np.float32]) -> None:
    """total [..., d_out, d_in] += the components in order, each addition in binary32."""
    for index, rows, components in _row_blocks(matrices, total.shape):
        for component in components:
            total[index][rows] += _term(component, rows)


def _row_blocks(
    matrices: Sequence[Sequence[ComponentFactors]], shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], slice, Sequence[ComponentFactors]]]:
    """Blocks of [..., d_out, d_in]: an index into the batch dimensions, a slice of rows, the matrix's components."""
    d_out, d_in = shape[-2:]
    step = max(1, _BLOCK_ELEMENTS // d_in) if d_in else max(1, d_out)
    for index, components in zip(np.ndindex(shape[:-2]), matrices, strict=True):
        for begin in range(0, d_out, step):
            yield index, slice(begin, min(begin + step, d_out)), components
