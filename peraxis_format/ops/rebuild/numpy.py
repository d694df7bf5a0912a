"""Base + delta -> weight: the exact arithmetic of SPEC 6 on numpy.

    a = f32(base);  for each component in order: a = fl32(a + term);  W = round(a) to the module's dtype
    term = b * 2^e * { row_i | col_j | row_i * col_j | scalar }        exact in binary32 (SPEC 6.1)

Work goes through blocks of rows, so that memory beyond input and output stays at a few MiB.
Rejected: `np.where(sign, +s, -s)`, which reads two arrays; here the sign bit of the scale is flipped instead.

numpy is the reference. Where numba is installed, large tensors go through rebuild/numba.py, which gives the same bits
twenty times sooner and is imported only then.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peraxis_format.bits import unpack_signs
from peraxis_format.delta import Axis, Component, Encoding, ModuleDelta
from peraxis_format.dtypes import Array, DType, from_float32, raw_bytes, to_float32
from peraxis_format.errors import ShapeError, fail
from peraxis_format.ops.exact import Backend
from peraxis_format.ops.exact import apply as apply_exact

__all__ = ["dense_delta", "have_compiled", "reconstruct", "term"]

_BLOCK_ELEMENTS = 1 << 18  # 1 MiB of binary32: a block and its temporaries stay in the second-level cache
_COMPILED_FROM = 1 << 20  # weights; below, numpy is done before numba is imported


@cache
def have_compiled() -> bool:
    """Whether rebuild/numba.py can be used here: numba is installed, and the machine is little-endian."""
    return sys.byteorder == "little" and find_spec("numba") is not None


def _f32(array: NDArray[np.float16] | None, batch: tuple[int, ...] = ()) -> NDArray[np.float32]:
    """A scale vector of one batch element in binary32, exactly."""
    if array is None:
        raise ShapeError("a component lacks a scale of its axis")
    scale: NDArray[np.float32] = array[batch].astype(np.float32)
    return scale


def scale_values(component: Component, rows: slice, batch: tuple[int, ...] = ()) -> NDArray[np.float32]:
    """The magnitudes |term| of a block of rows, broadcastable to [rows, d_in], exact in binary32 (SPEC 5.3)."""
    magnitude: NDArray[np.float32]
    if component.axis is Axis.TENSOR:
        magnitude = _f32(component.scalar)
    elif component.axis is Axis.COL:
        magnitude = _f32(component.col, batch)
    else:
        magnitude = _f32(component.row, batch)[rows, None]
        if component.axis is Axis.ROW_COL:
            magnitude = magnitude * _f32(component.col, batch)
    return magnitude * np.float32(2.0**component.exponent)


def term(component: Component, d_in: int, rows: slice, batch: tuple[int, ...] = ()) -> NDArray[np.float32]:
    """The term of SPEC 5.3 for a block of rows of one batch element: binary32 [rows, d_in]."""
    signs = unpack_signs(component.mask[batch][rows], d_in)
    magnitude = scale_values(component, rows, batch).view(np.uint32)
    # b = -1 is the sign bit; scales are >= +0, so their own sign bit is clear (SPEC 5.4).
    negative = (~signs).astype(np.uint32)
    negative <<= np.uint32(31)
    negative |= magnitude
    return negative.view(np.float32)


def _row_blocks(covered: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], slice]]:
    """Blocks of [..., d_out, d_in]: an index into the batch dimensions and a slice of rows."""
    d_out, d_in = covered[-2], covered[-1]
    step = max(1, _BLOCK_ELEMENTS // d_in)
    for batch in np.ndindex(covered[:-2]):
        for begin in range(0, d_out, step):
            yield batch, slice(begin, min(begin + step, d_out))


def reconstruct(module: ModuleDelta, base: Array | None = None, *, compiled: bool | None = None) -> Array:
    """Rebuild the fine-tuned tensor, bit for bit as SPEC 6 says.

    base: storage array of the base tensor, in the dtype and shape of `module.base`; not read for `full`.
    compiled: use rebuild/numba.py (True) or numpy (False); by default the first, where it can be had and the tensor is
    large.
    Returns a new storage array in the module's dtype and shape. Raises ShapeError if base does not fit,
    BindingError (E405) where an exact module does not give its result.
    """
    if module.encoding is Encoding.FULL:
        return np.array(module.full)  # SPEC 6.4
    ref = module.base
    if ref is None or base is None or base.shape != ref.shape or base.dtype != ref.dtype.storage:
        raise ShapeError(f"{module.name}: needs its base tensor, {ref}")
    out: NDArray[Any] = np.empty(module.shape, module.dtype.storage)
    kept = base[: module.kept] if module.shape else base
    covered = out[: module.kept] if module.shape else out
    if module.encoding is Encoding.SAME:
        # SPEC 6.3
        covered[...] = kept if ref.dtype is module.dtype else from_float32(to_float32(kept, ref.dtype), module.dtype)
    elif module.index is not None and module.data is not None:
        covered[...] = kept
        apply_exact(covered, module.index, module.data, module.dtype, backend=_backend(compiled))
    elif compiled or (compiled is None and covered.size >= _COMPILED_FROM and have_compiled()):
        from peraxis_format.ops.rebuild import numba as fast

        fast.rebuild(module.components, kept, covered, base_dtype=ref.dtype, dtype=module.dtype)
    else:
        _add_terms(module, kept, covered, ref.dtype)
    if module.tail is not None:
        out[module.kept :] = module.tail  # SPEC 6.4
    if module.result is not None and hashlib.sha256(raw_bytes(out)).hexdigest() != module.result:
        fail("E405", field=module.name)  # SPEC 7.4
    return out


def _backend(compiled: bool | None) -> Backend | None:
    return None if compiled is None else "numba" if compiled else "numpy"


def _add_terms(module: ModuleDelta, base: Array, out: Array, base_dtype: DType) -> None:
    """The reference of SPEC 6.1 and 6.2: base and out are the covered rows."""
    with np.errstate(over="ignore", invalid="ignore"):
        for batch, rows in _row_blocks(module.covered):
            # `+` copies: to_float32 may hand back a view of the base.
            total = to_float32(base[batch][rows], base_dtype)
            for component in module.components:
                total = total + term(component, module.shape[-1], rows, batch)
            out[batch][rows] = from_float32(total, module.dtype)


def dense_delta(module: ModuleDelta) -> NDArray[np.float32]:
    """The sum of a `sign` module's terms in order, in binary32: [..., d_out, d_in] over the covered rows."""
    total = np.zeros(module.covered, np.float32)
    for batch, rows in _row_blocks(module.covered):
        for component in module.components:
            total[batch][rows] += term(component, module.shape[-1], rows, batch)
    return total
