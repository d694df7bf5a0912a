"""Turn a planned module and its fit into the module that the file stores. Reads one tensor pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from peraxis_format import (
    Array,
    BaseRef,
    Component,
    DType,
    Encoding,
    ModuleDelta,
    Safetensors,
    ShapeError,
    count_changed,
    digest_of,
    lossless_module,
    reconstruct,
    to_float32,
)
from peraxis_tools.compress.fit.mean import mean_components
from peraxis_tools.compress.options import AUTO, CompressOptions
from peraxis_tools.compress.plan.finite import check_finite
from peraxis_tools.compress.plan.plan import TABLES, PlannedModule
from peraxis_tools.compress.plan.unchanged import is_unchanged, shared_rows
from peraxis_tools.compress.run.types import FittedModule, ModuleReport
from peraxis_tools.deltas.rows import restrict, row_blocks

__all__ = ["EncodedModule", "module_delta"]

_F16_MAX: Final = 65504.0
_OVERFLOW: Final = "stored exactly, because signs would make a weight infinite in F16"


@dataclass(frozen=True, slots=True)
class EncodedModule:
    """A module as the file stores it. exact_saving: about the bytes that the encoding `exact` would save; 0: none."""

    delta: ModuleDelta
    report: ModuleReport | None = None
    exact_saving: int = 0


def module_delta(
    module: PlannedModule,
    base: Safetensors,
    fine_tuned: Safetensors,
    fitted: FittedModule | None,
    options: CompressOptions,
) -> EncodedModule:
    """The module for the writer, with its report. Reads one tensor pair."""
    tuned_array = fine_tuned.read(module.name)
    if module.base_shape is None or module.base_dtype is None:
        return EncodedModule(_full(module, None, tuned_array))
    base_array = base.read(module.name)
    ref = BaseRef(dtype=module.base_dtype, shape=module.base_shape, sha256=digest_of(base_array))
    kept = shared_rows(module.shape, module.base_shape)
    grown = kept is not None and module.shape and kept < module.shape[0]
    tail = module.dtype.rows_from(tuned_array, module.shape, kept) if kept is not None and grown else None
    if kept is not None and is_unchanged(
        module.base_dtype.first_rows(base_array, module.base_shape, kept),
        module.dtype.first_rows(tuned_array, module.shape, kept),
        base_dtype=module.base_dtype,
        dtype=module.dtype,
    ):
        return EncodedModule(_signed(module, ref, (), tail))
    if module.encoding is Encoding.FULL:
        if options.is_exact(module.name) or (options.exact == AUTO and (fitted is None or fitted.full is None)):
            return EncodedModule(_lossless(module, base_array, ref, tuned_array, options))
        if fitted is not None and fitted.full is not None:
            return EncodedModule(_full(module, ref, fitted.full), fitted.report)
        whole = _full(module, ref, tuned_array)
        saving = 0 if kept is None else _exact_saving(whole, base_array, tuned_array)
        return EncodedModule(whole, None if fitted is None else fitted.report, exact_saving=saving)
    components: tuple[Component, ...] = ()
    report = None
    if fitted is not None:
        components, report = fitted.components, fitted.report
    elif module.encoding is Encoding.SIGN:
        try:
            components = _mean(module, base_array[:kept], tuned_array[:kept], module.base_dtype)
        except ShapeError:  # scales that are NaN or infinite; check_finite names the tensor and the index
            check_finite(module, base_array, tuned_array, base.label, fine_tuned.label)
            raise
    delta = _signed(module, ref, components, tail)
    if components and _overflows(delta, base_array[:kept], module.base_dtype):
        return EncodedModule(_lossless(module, base_array, ref, tuned_array, options), ModuleReport(note=_OVERFLOW))
    if options.exact == AUTO:
        lossless = _lossless(module, base_array, ref, tuned_array, options)
        if _payload_bytes(lossless) < _payload_bytes(delta):
            return EncodedModule(lossless)
    elif components:
        return EncodedModule(delta, report, exact_saving=_exact_saving(delta, base_array, tuned_array))
    return EncodedModule(delta, report)


def _exact_saving(delta: ModuleDelta, base: Array, tuned: Array) -> int:
    """About the bytes that the encoding `exact` would save; 0 for another dtype than the base's. base, tuned: all rows.

    An index takes up to two bytes and the new weight its own, so few changed weights take fewer bytes than signs.
    """
    if delta.base is None or delta.base.dtype is not delta.dtype or not delta.dtype.is_float or not delta.shape:
        return 0
    new = delta.dtype.size_of((delta.shape[0] - delta.kept, *delta.shape[1:]))
    changed = count_changed(base[: delta.kept], tuned[: delta.kept])
    return max(0, _payload_bytes(delta) - new - changed * (delta.dtype.itemsize + 2))


def _overflows(delta: ModuleDelta, base: Array, base_dtype: DType) -> bool:
    """Whether a rebuilt weight of finite ones is infinite: in F16 alone, because check_finite bounds the others.

    base: the covered rows. They are rebuilt only if the largest of them and the largest scales could exceed the range.
    """
    if delta.dtype is not DType.F16:
        return False
    largest = max(sum(float(c.row.max() * c.col.max()) for c in components) for components in delta.factors())
    blocks = (to_float32(base[rows], base_dtype) for rows in row_blocks(delta.covered))
    if max(float(max(block.max(), -block.min())) for block in blocks) + largest < _F16_MAX:
        return False
    rebuilt = (reconstruct(restrict(delta, rows), base[rows]) for rows in row_blocks(delta.covered))
    return not all(np.isfinite(to_float32(block, DType.F16)).all() for block in rebuilt)


def _mean(module: PlannedModule, base: Array, tuned: Array, base_dtype: DType) -> tuple[Component, ...]:
    return mean_components(
        base,
        tuned,
        base_dtype=base_dtype,
        dtype=module.dtype,
        axis=module.axis,
        components=module.components,
        for_outputs=module.kind not in TABLES,
    )


def _lossless(module: PlannedModule, base: Array, ref: BaseRef, tuned: Array, options: CompressOptions) -> ModuleDelta:
    return lossless_module(
        module.name, tuned, module.dtype, shape=module.shape, old=base, base=ref, prefer=options.prefer, threads=1
    )


def _payload_bytes(module: ModuleDelta) -> int:
    return sum(array.nbytes for _, array in module.tensors())


def _full(module: PlannedModule, ref: BaseRef | None, array: Array) -> ModuleDelta:
    return ModuleDelta(
        name=module.name, shape=module.shape, dtype=module.dtype, encoding=Encoding.FULL, base=ref, full=array
    )


def _signed(module: PlannedModule, ref: BaseRef, components: tuple[Component, ...], tail: Array | None) -> ModuleDelta:
    """The module with these components; `same` without any."""
    return ModuleDelta(
        name=module.name,
        shape=module.shape,
        dtype=module.dtype,
        encoding=Encoding.SIGN if components else Encoding.SAME,
        base=ref,
        components=components,
        tail=tail,
    )
