"""Find tensors that are the base's, cast, in a fine-tune of another dtype. The plan counts no byte for them.

Only tensors of another dtype are checked, a few rows first, so that a trained tensor costs one small read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from peraxis_format import Encoding, Safetensors
from peraxis_tools.compress.plan.plan import Plan, PlannedModule
from peraxis_tools.compress.plan.unchanged import is_unchanged, shared_rows

__all__ = ["with_casts"]

_PROBED_ROWS: Final = 4
_REASON: Final = "the base in another dtype"


def with_casts(plan: Plan, base: Safetensors, fine_tuned: Safetensors) -> Plan:
    """The plan with `same` for every tensor that equals the base's rounded once to its dtype (SPEC 6.3)."""
    return replace(plan, modules=tuple(_with_cast(module, base, fine_tuned) for module in plan.modules))


def _with_cast(module: PlannedModule, base: Safetensors, fine_tuned: Safetensors) -> PlannedModule:
    if module.base_dtype in (None, module.dtype) or module.base_shape is None or not module.shape:
        return module
    if not (module.dtype.is_float and module.base_dtype is not None and module.base_dtype.is_float):
        return module
    rows = shared_rows(module.shape, module.base_shape)
    if rows is None or not all(_is_cast(module, base, fine_tuned, n) for n in (min(rows, _PROBED_ROWS), rows)):
        return module
    return replace(module, encoding=Encoding.SAME, components=0, axis=None, reason=_REASON)


def _is_cast(module: PlannedModule, base: Safetensors, fine_tuned: Safetensors, rows: int) -> bool:
    name, covered = module.name, slice(0, rows)
    return module.base_dtype is not None and is_unchanged(
        base.read(name, covered), fine_tuned.read(name, covered), base_dtype=module.base_dtype, dtype=module.dtype
    )
