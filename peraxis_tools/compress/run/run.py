"""compress: the verb. Which steps a run takes, and how what they find becomes one file.

    open the pair -> refuse what does not fit together -> plan -> spend the byte target, if any -> show the plan
    fit none:    stream every tensor pair into the file (streamed.py)
    otherwise:   tokens -> embedding -> blocks -> lm_head (resumable) -> distillation (calibrated.py) -> the file

No torch before a fit needs it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peraxis_format import (
    Array,
    BaseRef,
    Component,
    DeltaWriter,
    Encoding,
    Manifest,
    ModuleDelta,
    Safetensors,
    TensorInfo,
    canonical_json,
    raw_bytes,
)
from peraxis_format import open as open_delta
from peraxis_tools.checkpoint import Checkpoint, open_checkpoint
from peraxis_tools.compress.fit.mean import mean_components
from peraxis_tools.compress.options import CompressOptions, OptionError
from peraxis_tools.compress.plan.budget import spend
from peraxis_tools.compress.plan.pairing import check_pair, tied_pairs
from peraxis_tools.compress.plan.plan import TABLES, Plan, PlannedModule, plan
from peraxis_tools.compress.run.streamed import StreamedFit
from peraxis_tools.compress.run.types import FittedModule, Fitting, ModuleReport, RunFit
from peraxis_tools.outputs import claim_file
from peraxis_tools.parallel import ordered_map
from peraxis_tools.text import Source

__all__ = ["CompressResult", "Progress", "compress"]

_COMPARED = 1 << 20  # bytes of a block
# A tensor in work holds itself, its base, and twice that in binary32 where a second mask is fitted.
BYTES_IN_FLIGHT_PER_TENSOR = 4
_AHEAD_BYTES = 512 << 20
OTHERS = "all others"

# Called as progress(step, done, total): what is being done, and how far it is.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressResult:
    """What `compress` made. Sizes in bytes; notes: modules that did not get what was planned, and why.
    unread_tokens: special tokens that the calibration text does not hold, so that no fit knows what they do."""

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
    unread_tokens: tuple[str, ...]


def compress(
    base: str | Path,
    fine_tuned: str | Path,
    output: str | Path,
    *,
    options: CompressOptions | None = None,
    base_revision: str | None = None,
    fine_tuned_revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    show_plan: Callable[[Plan], None] | None = None,
    **choices: Any,
) -> CompressResult:
    """Compress a fine-tuned checkpoint against its base into `output`.

    base, fine_tuned: folder, safetensors file or hub id. choices: single options by name, in place of `options`
    (compress(..., calibration="c4", masks=2)). show_plan is called with the plan before any work.
    Raises ToolError (OptionError, CheckpointError) before work starts where the pair or the options do not fit.
    """
    if options is not None and choices:
        raise OptionError(f"pass options, or {', '.join(choices)} by name, not both")
    options = options or CompressOptions.from_mapping(choices)
    output = Path(output)
    step = progress or _no_progress
    texts = (options.calibration,) if isinstance(options.calibration, str) else options.calibration or ()
    inputs = (base, fine_tuned, *(Source.parse(text).name for text in texts))
    # Of several processes the first one writes.
    alone = int(os.environ.get("RANK", "0")) == 0
    with (
        claim_file(output, overwrite=overwrite, inputs=inputs) if alone else contextlib.nullcontext(),
        open_checkpoint(base, revision=base_revision) as base_checkpoint,
        open_checkpoint(fine_tuned, revision=fine_tuned_revision) as tuned_checkpoint,
    ):
        return _compress_pair(base_checkpoint, tuned_checkpoint, output, options, step, show_plan, overwrite=overwrite)


def _compress_pair(
    base: Checkpoint,
    fine_tuned: Checkpoint,
    output: Path,
    options: CompressOptions,
    progress: Progress,
    show_plan: Callable[[Plan], None] | None,
    *,
    overwrite: bool,
) -> CompressResult:
    check_pair(base, fine_tuned)
    planned = plan(
        fine_tuned={info.name: info for info in fine_tuned.tensors.infos()},
        base={info.name: info for info in base.tensors.infos()},
        options=options,
        tied=tied_pairs(fine_tuned.tensors),
    )
    written = None
    with _fitting(base, fine_tuned, output, options, progress) as fitting:
        if options.has_target:
            planned = spend(planned, fitting.errors(planned), fine_tuned, options)
        if show_plan is not None:
            show_plan(planned)
        fit = fitting.fit(planned)
        if fitting.writes:
            written = _write(base, fine_tuned, fit, output, options, progress, overwrite=overwrite)
    if written is None:
        with open_delta(output) as delta:
            written = delta.manifest, delta.size
    return _result(output, *written, fit, options)


def _fitting(
    base: Checkpoint, fine_tuned: Checkpoint, output: Path, options: CompressOptions, progress: Progress
) -> Fitting:
    if options.resolved_fit == "none":
        return StreamedFit(base, fine_tuned, options)
    from peraxis_tools.compress.run.calibrated import CalibratedFit

    return CalibratedFit(base, fine_tuned, output, options, progress)


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
        for path, data in fine_tuned.assets():
            writer.add_asset(path, data)
        writer.metadata["peraxis.config"] = options.canonical_json()
        writer.metadata["peraxis.plan"] = _plan_json(planned)
        if reports:
            writer.metadata["peraxis.report"] = _report_json(reports)
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
        unread_tokens=fit.unread_tokens,
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
    if _same_bytes(module, base_array, tuned_array):
        return _delta(module, Encoding.SAME, ref), None
    if module.encoding is Encoding.FULL:
        whole = tuned_array if fitted is None or fitted.full is None else fitted.full
        return _full(module, ref, whole), None if fitted is None else fitted.report
    kept = min(module.shape[0], module.base_shape[0])
    tail = tuned_array[kept:] if kept < module.shape[0] else None
    components: tuple[Component, ...] = ()
    report = None
    if fitted is not None:
        components, report = fitted.components, fitted.report
    elif module.encoding is Encoding.SIGN:
        components = mean_components(
            base_array[:kept],
            tuned_array[:kept],
            base_dtype=module.base_dtype,
            dtype=module.dtype,
            axis=module.axis,
            components=module.components,
            for_outputs=module.kind not in TABLES,
        )
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


def _same_bytes(module: PlannedModule, base: Array, fine_tuned: Array) -> bool:
    """Whether nothing changed; a difference is mostly found in the first block."""
    if module.dtype is not module.base_dtype or base.shape != fine_tuned.shape:
        return False
    left, right = (np.frombuffer(raw_bytes(array), np.uint8) for array in (base, fine_tuned))
    return all(
        np.array_equal(left[i : i + _COMPARED], right[i : i + _COMPARED]) for i in range(0, len(left), _COMPARED)
    )


def _full(module: PlannedModule, ref: BaseRef | None, array: Array) -> ModuleDelta:
    return ModuleDelta(
        name=module.name, shape=module.shape, dtype=module.dtype, encoding=Encoding.FULL, base=ref, full=array
    )


def _delta(module: PlannedModule, encoding: Encoding, ref: BaseRef) -> ModuleDelta:
    return ModuleDelta(name=module.name, shape=module.shape, dtype=module.dtype, encoding=encoding, base=ref)


def _plan_json(planned: Plan) -> str:
    """The plan for the manifest: predicted bytes, and by choice the modules that it was made for.

    A choice is encoding, masks and axis, or why a module is full. Names are of one string each, and the most frequent
    choice goes without them (OTHERS): in a header of JSON within JSON a quote is four bytes.
    """
    choices: dict[str, list[str]] = defaultdict(list)
    for module in planned.modules:
        axis = "auto" if module.axis is None else module.axis.value
        signed = f"sign {module.components} {axis}"
        choices[signed if module.components else f"{module.encoding.value}: {module.reason}"].append(module.name)
    frequent = max(choices, key=lambda choice: len(choices[choice]), default=None)
    lines: dict[str, Any] = {
        choice: OTHERS if choice == frequent else " ".join(names) for choice, names in choices.items()
    }
    return canonical_json({"choices": lines, "payload_bytes": planned.payload_bytes}).decode()


def _report_json(reports: Mapping[str, ModuleReport]) -> str:
    """For the manifest, by module: [error, of `none`, of `same`] to three digits, and a note where there is one."""

    def line(report: ModuleReport) -> list[Any]:
        errors = (report.error, report.error_none, report.error_same)
        known = [] if report.error is None else [value if value is None else float(f"{value:.3g}") for value in errors]
        return [*known, *([report.note] if report.note else [])]

    lines = {name: values for name, report in reports.items() if (values := line(report))}
    return json.dumps(lines, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
