"""compress: the verb. Which steps a run takes, and how what they find becomes one file.

    open the pair -> refuse what does not fit together -> plan
    fit none:    stream every tensor pair into the file
    otherwise:   tokens -> embedding -> block by block -> lm_head (layerwise.py, resumable) -> distillation -> the file

No torch before a fit needs it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peraxis_format import (
    Array,
    BaseRef,
    Component,
    DeltaWriter,
    Encoding,
    Manifest,
    ModuleDelta,
    Safetensors,
    ShapeError,
    TensorInfo,
    raw_bytes,
)
from peraxis_format import open as open_delta
from peraxis_tools.assets import LEFT_BEHIND, listed
from peraxis_tools.checkpoint import Checkpoint, open_checkpoint, parse_identity
from peraxis_tools.compress.fit.mean import mean_components
from peraxis_tools.compress.options import CompressOptions, OptionError
from peraxis_tools.compress.plan.budget import is_open, spend, weight_errors
from peraxis_tools.compress.plan.finite import check_finite, check_pair_finite
from peraxis_tools.compress.plan.pairing import check_pair, check_saving, named_as_base, tied_pairs
from peraxis_tools.compress.plan.plan import Plan, PlannedModule, plan
from peraxis_tools.compress.plan.record import PLAN_KEY, REPORT_KEY, plan_text, report_text
from peraxis_tools.compress.plan.size import foretold
from peraxis_tools.compress.plan.unchanged import first_rows, is_unchanged, shared_rows
from peraxis_tools.compress.run.types import FittedModule, ModuleReport, RunFit
from peraxis_tools.notes import note
from peraxis_tools.outputs import claim_file
from peraxis_tools.parallel import ordered_map

__all__ = ["CompressResult", "Progress", "compress"]

# A tensor in work holds itself, its base, and twice that in binary32 where a second mask is fitted.
BYTES_IN_FLIGHT_PER_TENSOR = 4
_AHEAD_BYTES = 512 << 20

# Called as progress(step, done, total): what is being done, and how far it is.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressResult:
    """What `compress` made. Sizes in bytes; notes: modules that did not get what was planned, and why."""

    path: Path
    content_id: str
    size: int
    full_size: int
    ratio: float
    fit: str
    modules: int
    signed: int
    unchanged: int
    axes: Mapping[str, int]
    notes: Mapping[str, str]
    calibration_samples: int
    calibration_tokens: int


def compress(
    base: str | Path,
    fine_tuned: str | Path,
    output: str | Path,
    *,
    options: CompressOptions | None = None,
    base_revision: str | None = None,
    fine_tuned_revision: str | None = None,
    base_id: str | None = None,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    show_plan: Callable[[Plan], None] | None = None,
    **choices: Any,
) -> CompressResult:
    """Compress a fine-tuned checkpoint against its base into `output`.

    base, fine_tuned: folder, safetensors file or hub id. base_id: the hub id of a base that is a folder. choices:
    single options by name, in place of `options` (compress(..., calibration="c4", bits=2)). force: write a delta that
    saves little, too. show_plan is called with the plan before any work.
    Raises ToolError (OptionError, CheckpointError) before work starts where the pair or the options do not fit.
    """
    if options is not None and choices:
        raise OptionError(f"pass options, or {', '.join(choices)} by name, not both")
    options = options or CompressOptions.from_mapping(choices)
    output = Path(output)
    step = progress or _no_progress
    inputs = (base, fine_tuned, options.calibration)
    # Of several processes the first one writes.
    alone = int(os.environ.get("RANK", "0")) == 0
    with (
        claim_file(output, overwrite=overwrite, inputs=inputs) if alone else contextlib.nullcontext(),
        open_checkpoint(base, revision=base_revision) as opened_base,
        open_checkpoint(fine_tuned, revision=fine_tuned_revision) as opened,
    ):
        base_checkpoint, tuned_checkpoint = _matched(opened_base, opened, base_id)
        planned = _planned(base_checkpoint, tuned_checkpoint, options, step, force=force)
        planned = foretold(planned, base_checkpoint, tuned_checkpoint, options)
        if show_plan is not None and not (options.has_target and options.resolved_fit != "none"):
            show_plan(planned)
        if options.resolved_fit == "none" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise OptionError("fit none reads and writes: run it in one process, without torchrun")
        fit = RunFit(plan=planned)
        if options.resolved_fit != "none":
            from peraxis_tools.compress.run.calibrated import calibrated_fit

            fit = calibrated_fit(
                base_checkpoint, tuned_checkpoint, planned, output, options, step, show_plan or (lambda plan: None)
            )
        manifest, size = None, 0
        if fit.is_main_process:
            manifest, size = _write(base_checkpoint, tuned_checkpoint, fit, output, options, step, overwrite=overwrite)
        if fit.close is not None:
            fit.close()
        if fit.work is not None and fit.is_main_process:
            shutil.rmtree(fit.work, ignore_errors=True)
    if manifest is None:
        with open_delta(output) as delta:
            manifest, size = delta.manifest, delta.size
    return _result(output, manifest, size, fit, options)


def _matched(base: Checkpoint, fine_tuned: Checkpoint, base_id: str | None) -> tuple[Checkpoint, Checkpoint]:
    """The pair, held to be one: under the base's names, the base under its hub id. Says what is left behind."""
    if base_id is not None:
        base = replace(base, identity=parse_identity(base_id))
    fine_tuned = named_as_base(base, fine_tuned)
    check_pair(base, fine_tuned)
    left = fine_tuned.folder_assets().left
    if left:
        note(f"{fine_tuned.tensors.label}: not carried by a .pxd: {listed(left)}")
    return base, fine_tuned


def _planned(
    base: Checkpoint, fine_tuned: Checkpoint, options: CompressOptions, progress: Progress, *, force: bool
) -> Plan:
    """The plan, with the target spent where no fit does it later. Reads the pair's weights where a fit will."""
    planned = plan(
        fine_tuned={info.name: info for info in fine_tuned.tensors.infos()},
        base={info.name: info for info in base.tensors.infos()},
        options=options,
        tied=tied_pairs(fine_tuned.tensors),
    )
    if not options.has_target:
        check_saving(planned, base, fine_tuned, force=force)
    if options.has_target or options.resolved_fit != "none":
        check_pair_finite(planned.modules, base.tensors, fine_tuned.tensors, progress)
    if not options.has_target or options.resolved_fit != "none":
        return planned
    errors = {
        module.name: weight_errors(module, base.tensors, fine_tuned.tensors)
        for module in planned.modules
        if is_open(module, options)
    }
    return spend(planned, errors, fine_tuned, options)


def _no_progress(step: str, done: int, total: int) -> None:
    return None


def _write(
    base: Checkpoint,
    fine_tuned: Checkpoint,
    fit: RunFit,
    output: Path,
    options: CompressOptions,
    progress: Progress,
    *,
    overwrite: bool,
) -> tuple[Manifest, int]:
    """Write the file. Returns its manifest and its bytes."""
    planned = fit.plan
    reports: dict[str, ModuleReport] = {}
    with DeltaWriter(
        output,
        base=base.identity,
        fine_tuned=fine_tuned.identity,
        calibration=fit.calibration,
        overwrite=overwrite,
    ) as writer:
        done, total = 0, planned.full_bytes

        def made(module: PlannedModule) -> tuple[ModuleDelta, ModuleReport | None]:
            return _module_delta(module, base.tensors, fine_tuned.tensors, fit.modules.get(module.name))

        def held(module: PlannedModule) -> int:
            return BYTES_IN_FLIGHT_PER_TENSOR * fine_tuned.tensors[module.name].size

        # Reading and hashing one tensor beside fitting another.
        for delta, report in ordered_map(made, planned.modules, cost=held, budget=_AHEAD_BYTES):
            writer.add(delta)
            if report is not None:
                reports[delta.name] = report
            done += fine_tuned.tensors[delta.name].size
            progress("write", done, total)
        for name, alias in planned.tied:
            writer.tie(name, alias)
        for name in planned.dropped:
            writer.drop(name)
        assets = fine_tuned.folder_assets()
        for path in assets.carried:
            writer.add_asset(path, assets.read(path))
        if assets.left:
            writer.metadata[LEFT_BEHIND] = "".join(f"{path}\n" for path in assets.left)
        writer.metadata["peraxis.config"] = options.canonical_json()
        writer.metadata[PLAN_KEY] = plan_text(planned)
        names = [module.name for module in planned.modules]
        lines = {n: (r.error, r.error_none, r.error_same, r.note) for n, r in reports.items()}
        if said := report_text(names, lines):
            writer.metadata[REPORT_KEY] = said
        writer.metadata.update(fit.metadata)
        return writer.finish(), writer.size


def _result(output: Path, manifest: Manifest, size: int, fit: RunFit, options: CompressOptions) -> CompressResult:
    """What there is to say of a written file."""
    counts = Counter(module.encoding for module in manifest.modules)
    axes = Counter(component.axis.value for module in manifest.modules for component in module.components)
    return CompressResult(
        path=output,
        content_id=manifest.content_id,
        size=size,
        full_size=fit.plan.full_bytes,
        ratio=round(fit.plan.full_bytes / size, 4),
        fit=options.resolved_fit,
        modules=len(manifest.modules),
        signed=counts[Encoding.SIGN],
        unchanged=counts[Encoding.SAME],
        axes=dict(sorted(axes.items())),
        notes={name: module.report.note for name, module in fit.modules.items() if module.report.note},
        calibration_samples=fit.calibration.samples if fit.calibration else 0,
        calibration_tokens=fit.tokens,
    )


def _module_delta(
    module: PlannedModule, base: Safetensors, fine_tuned: Safetensors, fitted: FittedModule | None
) -> tuple[ModuleDelta, ModuleReport | None]:
    """The module as it is stored, and what there is to report of it. Reads one tensor pair."""
    tuned_array = fine_tuned.read(module.name)
    if module.base_shape is None or module.base_dtype is None:
        return _full(module, None, tuned_array), None
    base_array = base.read(module.name)
    ref = base_ref(base[module.name], base_array)
    kept = shared_rows(module.shape, module.base_shape)
    tail = tuned_array[kept:] if kept is not None and module.shape and kept < module.shape[0] else None
    if kept is not None and is_unchanged(
        first_rows(base_array, kept),
        first_rows(tuned_array, kept),
        base_dtype=module.base_dtype,
        dtype=module.dtype,
    ):
        return _same(module, ref, tail), None
    if module.encoding is Encoding.FULL:
        whole = tuned_array if fitted is None or fitted.full is None else fitted.full
        return _full(module, ref, whole), None if fitted is None else fitted.report
    components: tuple[Component, ...] = ()
    report = None
    if fitted is not None:
        components, report = fitted.components, fitted.report
    elif module.encoding is Encoding.SIGN:
        try:
            components = mean_components(
                base_array[:kept],
                tuned_array[:kept],
                base_dtype=module.base_dtype,
                dtype=module.dtype,
                axis=module.axis,
                components=module.components,
            )
        except ShapeError:  # scales that are no numbers; the tensor and the index say more
            check_finite(module, base_array, tuned_array, base.label, fine_tuned.label)
            raise
    encoding = Encoding.SIGN if components else Encoding.SAME
    delta = ModuleDelta(
        name=module.name,
        shape=module.shape,
        dtype=module.dtype,
        encoding=encoding,
        base=ref,
        components=components,
        tail=tail,
    )
    return delta, report


def base_ref(info: TensorInfo, array: Array) -> BaseRef:
    """The reference to a base tensor, from its bytes in memory."""
    return BaseRef(dtype=info.dtype, shape=info.shape, sha256=hashlib.sha256(raw_bytes(array)).hexdigest())


def _full(module: PlannedModule, ref: BaseRef | None, array: Array) -> ModuleDelta:
    return ModuleDelta(
        name=module.name, shape=module.shape, dtype=module.dtype, encoding=Encoding.FULL, base=ref, full=array
    )


def _same(module: PlannedModule, ref: BaseRef, tail: Array | None) -> ModuleDelta:
    return ModuleDelta(
        name=module.name, shape=module.shape, dtype=module.dtype, encoding=Encoding.SAME, base=ref, tail=tail
    )
