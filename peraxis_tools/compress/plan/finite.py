"""Find weights that are NaN or infinite before the work begins, and name the tensor, the index and the count."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from peraxis_format import Array, DType, Encoding, Safetensors
from peraxis_tools.compress.plan.plan import PlannedModule
from peraxis_tools.compress.plan.unchanged import is_unchanged
from peraxis_tools.errors import ToolError
from peraxis_tools.progress import Staged

__all__ = ["check_finite", "check_pair_finite"]

# All exponent bits set: infinity or NaN.
_EXPONENTS: Final = {
    DType.F32: (np.uint32, 0x7F800000),
    DType.F16: (np.uint16, 0x7C00),
    DType.BF16: (np.uint16, 0x7F80),
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
    """Raise ToolError if the delta of these two has NaN or infinity. Equal tensors pass, because they need no delta."""
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
    kind = "NaN" if _is_nan(array[tuple(at)], dtype) else "infinity"
    raise ToolError(
        f"{name}: {module.name} holds {kind} at {at} ({int(bad.sum())} of {array.size} values are not finite); "
        "repair or fetch the checkpoint again"
    )


def _blocks(array: Array) -> Iterable[Array]:
    flat = array.reshape(-1)
    return (flat[begin : begin + _BLOCK] for begin in range(0, flat.size, _BLOCK))


def _bad(block: Array, dtype: DType) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    kind, exponent = _EXPONENTS[dtype]
    bad: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = (block.view(kind) & kind(exponent)) == kind(exponent)
    return bad


def _any(array: Array, dtype: DType) -> bool:
    return any(bool(_bad(block, dtype).any()) for block in _blocks(array))


def _is_nan(value: Array, dtype: DType) -> bool:
    kind, exponent = _EXPONENTS[dtype]
    bits = int(np.asarray(value).view(kind))
    return bool(bits & (exponent & -exponent) - 1)
