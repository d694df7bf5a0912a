"""The size of the file of a plan, before any work: header, assets and data, by the functions that write them."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from peraxis_format import (
    Asset,
    Axis,
    BaseIdentity,
    BaseRef,
    Calibration,
    ComponentEntry,
    Encoding,
    Identity,
    Manifest,
    ModuleEntry,
    Producer,
    PxdError,
    file_size,
    header_bytes,
    layout,
)
from peraxis_tools.checkpoints.assets import LEFT_BEHIND
from peraxis_tools.checkpoints.checkpoint import Checkpoint
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan.plan import Plan, PlannedModule
from peraxis_tools.compress.plan.record import PLAN_KEY, Line, plan_text, report_text
from peraxis_tools.deltas.metadata_keys import CONFIG_KEY, REPORT_KEY
from peraxis_tools.errors import ToolError

__all__ = ["predicted_size", "with_file_bytes"]

_NONE: Final = "0" * 64
_EXPONENT: Final = -20  # typical: two digits and a sign
_SOURCE: Final = 160  # characters that the record of a text has beyond its name
_UNKNOWN: Final = Identity(id="x" * 80)
_LINE: Final[Line] = (1.23e-05, 1.23e-05, 0.00123, "")


def predicted_size(plan: Plan, options: CompressOptions) -> int:
    """The bytes of the file of this plan. Open axes count as row+col, exponents as two digits."""
    return file_size(_manifest(plan, options), _asset_bytes(plan))


def with_file_bytes(plan: Plan, fine_tuned: Checkpoint, options: CompressOptions) -> Plan:
    """The plan with the size of its file. Raises ToolError if the header would be too large for a reader."""
    manifest = _manifest(plan, options)
    try:
        header_bytes(manifest.to_bytes(), layout(manifest.modules, _asset_bytes(plan)))
    except PxdError as error:
        raise ToolError(
            f"{fine_tuned.tensors.label}: {len(plan.modules)} tensors do not fit into one header ({error.detail}); "
            "use fewer masks (--masks)"
        ) from None
    return replace(plan, file_bytes=file_size(manifest, _asset_bytes(plan)))


def _asset_bytes(plan: Plan) -> list[int]:
    return [size for _, size in plan.assets]


def _manifest(plan: Plan, options: CompressOptions) -> Manifest:
    names = [module.name for module in plan.modules]
    fitted = {module.name: _LINE for module in plan.modules if module.components}
    metadata = {CONFIG_KEY: options.canonical_json(), PLAN_KEY: plan_text(plan)}
    calibration = None
    if options.resolved_fit != "none":
        metadata[REPORT_KEY] = report_text(names, fitted)
        given = options.calibration or ()
        source = "x" * (_SOURCE + sum(map(len, (given,) if isinstance(given, str) else given)))
        calibration = Calibration(digest=_NONE, samples=9999, seed=options.seed, sequence_length=9999, source=source)
    if plan.left_behind:
        metadata[LEFT_BEHIND] = plan.left_behind
    base, fine_tuned = plan.identities or (_UNKNOWN, _UNKNOWN)
    return Manifest(
        base=BaseIdentity(digest=f"sha256:{_NONE}", id=base.id, revision=base.revision),
        fine_tuned=fine_tuned,
        calibration=calibration,
        producer=Producer(name="peraxis", version="0.0.0"),
        modules=tuple(_entry(module) for module in plan.modules),
        tied=plan.tied,
        dropped=plan.dropped,
        assets=tuple(Asset(path=path, sha256=_NONE) for path, _ in plan.assets),
        metadata=metadata,
    )


def _entry(module: PlannedModule) -> ModuleEntry:
    base = None
    if module.base_shape is not None and module.base_dtype is not None:
        base = BaseRef(dtype=module.base_dtype, shape=module.base_shape, sha256=_NONE)
    grown = bool(base and module.shape and base.shape and module.shape[0] > base.shape[0])
    return ModuleEntry(
        name=module.name,
        shape=module.shape,
        dtype=module.dtype,
        encoding=module.encoding,
        components=(ComponentEntry(axis=module.axis or Axis.ROW_COL, exponent=_EXPONENT),) * module.components,
        sha256=None if module.encoding is Encoding.SAME and not grown else _NONE,
        base=base,
    )
