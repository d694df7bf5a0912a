"""Find weights that are NaN, infinite or absurdly large; name tensor, index and count.

A fit squares differences of weights in float32, so weights above 2^40, which no model has, are refused like infinity.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import Final

import numpy as np

from peraxis_format import Array, DType, Encoding, Safetensors, to_float32
from peraxis_tools.compress.plan.plan import PlannedModule
from peraxis_tools.compress.plan.unchanged import is_unchanged
from peraxis_tools.display.progress import Staged
from peraxis_tools.errors import ToolError

__all__ = ["check_finite", "check_pair_finite", "count_not_finite"]

# The exponent bits, all of which are set in infinity and NaN, and those of 2^40, which F16 does not reach.
_EXPONENTS: Final = {
    DType.F32: (np.uint32, 0x7F800000, (127 + 40) << 23),
    DType.F16: (np.uint16, 0x7C00, 0x7C00),
    DType.BF16: (np.uint16, 0x7F80, (127 + 40) << 7),
}
_BLOCK: Final = 1 << 20  # elements of one block


def check_pair_finite(
    modules: Iterable[PlannedModule], base: Safetensors, fine_tuned: Safetensors, progress: Staged
) -> None:
    """Call check_finite for every module with signs, and read each once. Raises ToolError."""
    signed = [module for module in modules if module.encoding is Encoding.SIGN]
    total = sum(fine_tuned[module.name].size for module in signed)
    done = 0
    for module in signed:
        check_finite(module, base.read(module.name), fine_tuned.read(module.name), base.label, fine_tuned.label)
        done += fine_tuned[module.name].size
        progress("check", done, total)


def check_finite(module: PlannedModule, base: Array, fine_tuned: Array, base_label: str, label: str) -> None:
    """Raise ToolError if one of these two has NaN, infinity or a weight above 2^40.

    Equal tensors pass, because they need no delta.
    """
    sides = ((base, module.base_dtype, base_label), (fine_tuned, module.dtype, label))
    found = [(array, dtype, name) for array, dtype, name in sides if dtype is not None and _any(array, dtype)]
    if not found:
        return
    known = module.base_dtype if base.shape == fine_tuned.shape else None
    if known is not None and is_unchanged(base, fine_tuned, base_dtype=known, dtype=module.dtype):
        return
    array, dtype, name = found[0]
    bad = np.concatenate([_bad(block, dtype) for block in _blocks(array)])
    at = [int(i) for i in np.unravel_index(int(bad.argmax()), array.shape)]
    raise ToolError(
        f"{name}: {module.name} holds {_kind(array[tuple(at)], dtype)} at {at} ({int(bad.sum())} of {array.size} "
        "values are not finite, or above 2^40); repair or fetch the checkpoint again, or keep its bits with exact "
        f"(--exact {shlex.quote(re.escape(module.name))}; join several names with |)"
    )


def count_not_finite(array: Array, dtype: DType) -> int:
    """The number of elements that are NaN or infinite; 0 for dtypes other than F32, F16 and BF16."""
    if dtype not in _EXPONENTS:
        return 0
    kind, exponent, _ = _EXPONENTS[dtype]
    return sum(int(((block.view(kind) & kind(exponent)) == kind(exponent)).sum()) for block in _blocks(array))


def _blocks(array: Array) -> Iterable[Array]:
    flat = array.reshape(-1)
    return (flat[begin : begin + _BLOCK] for begin in range(0, flat.size, _BLOCK))


def _bad(block: Array, dtype: DType) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    kind, exponent, limit = _EXPONENTS[dtype]
    bad: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = (block.view(kind) & kind(exponent)) >= kind(limit)
    return bad


def _any(array: Array, dtype: DType) -> bool:
    return any(bool(_bad(block, dtype).any()) for block in _blocks(array))


def _kind(value: Array, dtype: DType) -> str:
    kind, exponent, _ = _EXPONENTS[dtype]
    bits = int(np.asarray(value).view(kind))
    if bits & exponent < exponent:
        return f"{float(to_float32(np.asarray(value), dtype)):.3g}"
    return "NaN" if bits & (exponent & -exponent) - 1 else "infinity"
