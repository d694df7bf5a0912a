"""The error that `--fit none` leaves in each module, as a price that the modules of one pair share. No text, no torch.

    price_mk = w_m E(R_mk) / E(D_m)        R_mk = fine-tuned weight - applied weight with k masks, D_m: with none

R is measured after the rounding to the stored dtype: where the delta is below half a unit, a mask may do nothing. E is
the error of the outputs, with the delta's own directions (fit/directions.py); of a table, which no input multiplies or
whose inputs the delta does not show, the squared error. The price is a share of E(D), because neither error says
anything of the KL across modules. So each matrix counts the same (w: their typical size), and a table _TABLE times its
own size: of three pairs whose KL was measured module by module, this is nearest to the best use of the bytes; weights
that count the same, and errors relative to the weight, are worse (docs/decisions/default-plan.md).

Up to PRICED_ROWS rows of a module are measured and up to MEASURED_MASKS masks; each further mask leaves the last
measured share of the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from peraxis_format import Array, Component, ComponentFactors, Safetensors, kept_rows, to_float32
from peraxis_format.ops.rebuild import rebuild
from peraxis_tools.compress.fit.directions import output_errors
from peraxis_tools.compress.fit.mean import mean_components
from peraxis_tools.compress.plan.plan import TABLES, PlannedModule
from peraxis_tools.compress.plan.unchanged import is_unchanged

__all__ = ["MASKS_MAX", "MEASURED_MASKS", "PRICED_ROWS", "extended", "measured_errors", "prices", "shares_left"]

MASKS_MAX: Final = 8
_TABLE: Final = 4.0
PRICED_ROWS: Final = 512
_RANGES: Final = 8
MEASURED_MASKS: Final = 3
_COMPARED: Final = 1 << 22  # weights at a time


def prices(modules: Sequence[PlannedModule], base: Safetensors, fine_tuned: Safetensors) -> dict[str, list[float]]:
    """By module, the price of 0 to MASKS_MAX masks; zeros where nothing changed. Reads one tensor pair at a time."""
    sizes = [math.log(math.prod(m.shape[-2:])) for m in modules if m.kind not in TABLES]
    typical = math.exp(sum(sizes) / max(1, len(sizes)))
    found = {}
    for module in modules:
        weight = _TABLE * math.prod(module.shape) if module.kind in TABLES else math.prod(module.shape[:-2]) * typical
        found[module.name] = [weight * share for share in shares_left(module, base, fine_tuned)]
    return found


def shares_left(module: PlannedModule, base: Safetensors, fine_tuned: Safetensors) -> list[float]:
    """E(R_k) / E(D) for 0 to MASKS_MAX masks: 1 for none, or zeros for a module that equals the base's."""
    if module.base_shape is None or module.base_dtype is None:
        raise ValueError(f"{module.name} has no base")
    left, right = (_sampled(tensors, module) for tensors in (base, fine_tuned))
    if _unchanged(module, left, right):
        rows = slice(0, kept_rows(module.shape, module.base_shape))
        left, right = base.read(module.name, rows), fine_tuned.read(module.name, rows)
        if _unchanged(module, left, right):
            return [0.0] * (MASKS_MAX + 1)
        left, right = _changed_rows(module, left, right)
    errors = measured_errors(module, left, right)
    if not errors[0] > 0.0:  # the change is too small for E
        return [1.0] * (MASKS_MAX + 1)
    nothing = errors[0]
    if math.isinf(nothing):  # a base in another dtype, beyond the range of this one
        return [1.0] + [math.inf] * MASKS_MAX
    # Three digits, so that the plan does not depend on a library's last bits.
    return [float(f"{error / nothing:.3g}") for error in extended(errors)]


def measured_errors(module: PlannedModule, left: Array, right: Array) -> list[float]:
    """E with 0 to MEASURED_MASKS masks. left, right: storage arrays [n, d_out, d_in] of rows of the module."""
    components = mean_components(
        left,
        right,
        base_dtype=module.base_dtype or module.dtype,
        dtype=module.dtype,
        axis=module.axis,
        components=MEASURED_MASKS,
        for_outputs=module.kind not in TABLES,
    )
    return _errors(module, left, right, components)


def extended(errors: Sequence[float]) -> list[float]:
    """Errors of 0 to MASKS_MAX masks from those of the first few. None is above the one before it, so that a mask that
    does nothing is never bought. The error is infinite where masks make a weight infinite."""
    found = [errors[0]]
    for error in errors[1:]:
        found.append(error if math.isinf(error) else min(error, found[-1]))
    if math.isinf(found[-1]):
        return found + [math.inf] * (1 + MASKS_MAX - len(found))
    share = found[-1] / found[-2] if len(found) > 1 and 0.0 < found[-2] < math.inf else 1.0
    while len(found) <= MASKS_MAX:
        found.append(found[-1] * share)
    return found


def _unchanged(module: PlannedModule, left: Array, right: Array) -> bool:
    return is_unchanged(left, right, base_dtype=module.base_dtype or module.dtype, dtype=module.dtype)


def _sampled(tensors: Safetensors, module: PlannedModule) -> Array:
    """Read a sample, [n, rows, d_in]: PRICED_ROWS rows of one matrix in _RANGES ranges, or rows of _RANGES matrices."""
    count = kept_rows(module.shape, module.base_shape or module.shape)
    size = 1 if len(module.shape) > 2 else max(1, PRICED_ROWS // _RANGES)
    if count <= size * _RANGES:
        read = [tensors.read(module.name, slice(0, count))]
    else:
        starts = [(count - size) * i // (_RANGES - 1) for i in range(_RANGES)]
        read = [tensors.read(module.name, slice(start, start + size)) for start in starts]
    whole = np.concatenate(read)
    matrices = whole.reshape(-1, *whole.shape[-2:])
    step = -(-matrices.shape[1] // PRICED_ROWS)
    return np.ascontiguousarray(matrices[:_RANGES, ::step])


def _changed_rows(module: PlannedModule, left: Array, right: Array) -> tuple[Array, Array]:
    """[1, rows, d_in] of both: at most PRICED_ROWS rows of a changed module that are not the base's."""
    dtype, base_dtype = module.dtype, module.base_dtype or module.dtype
    width = left.shape[-1]
    left, right = left.reshape(-1, width), right.reshape(-1, width)
    step = max(1, _COMPARED // max(1, width))
    found: list[int] = []
    for begin in range(0, len(left), step):
        some = slice(begin, begin + step)
        differs = to_float32(left[some], base_dtype) != to_float32(right[some], dtype)
        found += (begin + np.flatnonzero(differs.any(axis=1))).tolist()
    chosen = found[:: -(-len(found) // PRICED_ROWS) or 1] or [0]
    return left[chosen][None], right[chosen][None]


def _errors(module: PlannedModule, left: Array, right: Array, components: Sequence[Component]) -> list[float]:
    """E of the applied weight with the first 0, 1, 2, ... components; infinite where a weight is, as F16 may make it.

    left, right: storage arrays [n, d_out, d_in].
    """
    factors = list(zip(*(component.factors(left.shape) for component in components), strict=True))
    found = np.zeros(1 + len(components))
    for e, (base, tuned) in enumerate(zip(left, right, strict=True)):
        its = factors[e] if components else ()
        residuals = (_residual(module, base, tuned, its[:k]) for k in range(1 + len(components)))
        with np.errstate(invalid="ignore"):
            if module.kind in TABLES:
                found += [float(np.square(residual, dtype=np.float64).sum()) for residual in residuals]
            else:
                delta = to_float32(tuned, module.dtype) - to_float32(base, module.base_dtype or module.dtype)
                found += output_errors(residuals, delta)
    errors: list[float] = np.where(np.isfinite(found), found, np.inf).tolist()
    return errors


def _residual(
    module: PlannedModule, base: Array, tuned: Array, factors: Sequence[ComponentFactors]
) -> NDArray[np.float32]:
    """One matrix of the fine-tune minus the applied one, in binary32."""
    base_dtype = module.base_dtype or module.dtype
    applied = to_float32(base, base_dtype)
    if factors:
        out = np.empty(tuned.shape, module.dtype.storage)
        rebuild([factors], base[None], out[None], base_dtype=base_dtype, dtype=module.dtype)
        applied = to_float32(out, module.dtype)
    residual: NDArray[np.float32] = to_float32(tuned, module.dtype) - applied
    return residual
