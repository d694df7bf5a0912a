"""The verb compress: the steps of a run, in order, and the file that they write.

    open the pair -> check that it is a pair -> plan -> spend the byte target, if any -> show the plan
    fit none:    stream every tensor pair into the file (streamed.py)
    otherwise:   tokens -> embedding -> blocks -> lm_head (resumable) -> distillation (calibrated.py) -> the file

torch is imported only when a fit needs it.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peraxis_format import (
    DeltaWriter,
    Encoding,
    Manifest,
    ShapeError,
)
from peraxis_format import open as open_delta
from peraxis_tools.checkpoints.assets import LEFT_BEHIND
from peraxis_tools.checkpoints.checkpoint import Checkpoint, open_checkpoint
from peraxis_tools.checkpoints.completeness import note_missing
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan.budget import is_open, spend, target_of
from peraxis_tools.compress.plan.finite import check_pair_finite
from peraxis_tools.compress.plan.pair_plan import plan_pair, with_text
from peraxis_tools.compress.plan.pairing import matched
from peraxis_tools.compress.plan.plan import Plan, PlannedModule
from peraxis_tools.compress.plan.price import prices
from peraxis_tools.compress.plan.record import PLAN_KEY, plan_text, report_text
from peraxis_tools.compress.plan.saving import check_saving, saves
from peraxis_tools.compress.plan.size import with_file_bytes
from peraxis_tools.compress.run.module_delta import Written, module_delta
from peraxis_tools.compress.run.streamed import StreamedFit
from peraxis_tools.compress.run.types import OPEN_STEPS, Fitting, ModuleReport, RunFit
from peraxis_tools.deltas.blocks import count_blocks
from peraxis_tools.deltas.metadata_keys import CONFIG_KEY, DISTILLATION_KEY, REPORT_KEY
from peraxis_tools.deltas.module_counts import count_encodings
from peraxis_tools.display.notes import note
from peraxis_tools.display.progress import Staged, StagedProgress, watched_stages
from peraxis_tools.display.shown import counted
from peraxis_tools.outputs.rules import claim_delta
from peraxis_tools.process.optional import require
from peraxis_tools.process.parallel import ordered_map
from peraxis_tools.process.threads import one_blas_thread
from peraxis_tools.texts.samples import check_calibration

__all__ = ["CompressResult", "compress"]

# A tensor in work takes its own bytes, its base's, and twice that in binary32 if a second mask is fitted.
_BYTES_IN_FLIGHT_PER_TENSOR = 4
_AHEAD_BYTES = 512 << 20
_EXACT_SAVING = 0.2  # the share of a file that exact tensors would save, from which a note says so
_NO_TEXT = (
    "no calibration text: scales are mean magnitudes; calibration (--calibration c4, or your own text) gives a better "
    "fit of the same size"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressResult:
    """The result of `compress`. Sizes are bytes. notes: modules that differ from the plan, and the reason.
    encodings: modules by encoding. blocks: those of exact modules by mode (SPEC 5.6), chosen for `prefer`.
    distillation: its samples, steps, and held-out loss before and after, in words; empty without one.
    unread_tokens: special tokens that are not in the calibration text, so that no fit covers them."""

    path: Path
    content_id: str
    bytes: int
    full_bytes: int
    ratio: float
    fit: str
    module_count: int
    encodings: Mapping[str, int]
    blocks: Mapping[str, int]
    prefer: str
    axis_counts: Mapping[str, int]
    notes: Mapping[str, str]
    calibration_samples: int
    calibration_tokens: int
    distillation: str
    unread_tokens: tuple[str, ...]


def compress(
    base: str | Path,
    fine_tuned: str | Path,
    output: str | Path,
    *,
    options: CompressOptions,
    base_revision: str | None = None,
    fine_tuned_revision: str | None = None,
    base_id: str | None = None,
    overwrite: bool = False,
    force: bool = False,
    progress: StagedProgress = None,
    show_plan: Callable[[Plan], None] | None = None,
) -> CompressResult:
    """Compress a fine-tuned checkpoint against its base into `output`.

    base, fine_tuned: a folder, a safetensors file or a hub id. base_id: the hub id of a base that is a folder. force:
    write the delta even if it saves little. show_plan is called with the plan before any work.
    progress: called with (stage, done, total), or True for bars.
    Raises ToolError (OptionError, CheckpointError) before work starts if the pair or the options are wrong.
    """
    if options.resolved_fit != "none":
        require(f"--fit {options.resolved_fit}", "torch", "transformers", "datasets", extra="compress")
    output = Path(output)
    inputs = (base, fine_tuned, *check_calibration(options.calibration))
    # With several processes, the first one writes.
    alone = int(os.environ.get("RANK", "0")) == 0
    with (
        claim_delta(output, overwrite=overwrite, inputs=inputs) if alone else contextlib.nullcontext(),
        watched_stages(progress) as step,
        one_blas_thread(),  # numpy's products are small, and tensors have the threads
        open_checkpoint(base, revision=base_revision) as opened_base,
        open_checkpoint(fine_tuned, revision=fine_tuned_revision) as opened,
    ):
        base_checkpoint, tuned_checkpoint = matched(opened_base, opened, base_id)
        asked = options.calibration_samples is not None
        options = with_text(options, tuned_checkpoint)
        note_missing(base_checkpoint, tuned_checkpoint)
        return _compress_pair(
            base_checkpoint,
            tuned_checkpoint,
            output,
            options,
            step,
            show_plan,
            overwrite=overwrite,
            force=force,
            asked=asked,
        )


def _compress_pair(
    base: Checkpoint,
    fine_tuned: Checkpoint,
    output: Path,
    options: CompressOptions,
    progress: Staged,
    show_plan: Callable[[Plan], None] | None,
    *,
    overwrite: bool,
    force: bool,
    asked: bool,
) -> CompressResult:
    planned = _planned(base, fine_tuned, options, progress, force=force)
    if options.fit == "auto" and options.calibration is None and any(module.components for module in planned.modules):
        note(_NO_TEXT)
    written: tuple[Manifest, int, Mapping[str, int], Mapping[str, str]] | None = None
    if options.resolved_fit != "none":
        progress("open", 0, OPEN_STEPS)  # imports of the next line included
    with _fitting(base, fine_tuned, output, options, progress, asked=asked) as fitting:
        fitting.open()
        if options.has_target:
            planned = spend(planned, fitting.errors(planned), options)
            planned = _foretold(planned, base, fine_tuned, options, force=force)
        elif options.spends_freely:
            planned = _spent(planned, base, fine_tuned, options, progress)
        if show_plan is not None:
            show_plan(planned)
        fit = fitting.fit(planned)
        if fitting.writes:
            written = _write(base, fine_tuned, fit, output, options, progress, overwrite=overwrite, force=force)
    if written is None:
        with open_delta(output) as delta:
            exact = [entry.name for entry in delta.manifest.modules if entry.encoding is Encoding.EXACT]
            blocks = sum((count_blocks(delta.load(name)) for name in exact), Counter[str]())
            notes = {name: module.report.note for name, module in fit.modules.items() if module.report.note}
            written = delta.manifest, delta.size, blocks, notes
    return _result(output, *written, fit, options)


def _fitting(
    base: Checkpoint, fine_tuned: Checkpoint, output: Path, options: CompressOptions, progress: Staged, *, asked: bool
) -> Fitting:
    if options.resolved_fit == "none":
        return StreamedFit(base, fine_tuned, options)
    from peraxis_tools.compress.run.calibrated import CalibratedFit

    return CalibratedFit(base, fine_tuned, output, options, progress, asked=asked)


def _planned(
    base: Checkpoint, fine_tuned: Checkpoint, options: CompressOptions, progress: Staged, *, force: bool
) -> Plan:
    """The plan; without a target its saving is checked. Reads the pair's weights if a fit will use them."""
    planned = plan_pair(base, fine_tuned, options)
    if not options.has_target:
        planned = _foretold(planned, base, fine_tuned, options, force=force)
    if options.has_target or options.resolved_fit != "none":
        check_pair_finite(planned.modules, base.tensors, fine_tuned.tensors, progress)
    return planned


def _spent(planned: Plan, base: Checkpoint, fine_tuned: Checkpoint, options: CompressOptions, progress: Staged) -> Plan:
    """The bytes of this plan, spent by the prices that need no text."""
    try:
        errors = prices([m for m in planned.modules if is_open(m, options)], base.tensors, fine_tuned.tensors)
    except ShapeError:  # values that are NaN or infinite; the check names the tensor and the index
        check_pair_finite(planned.modules, base.tensors, fine_tuned.tensors, progress)
        raise
    return with_file_bytes(spend(planned, errors, options), fine_tuned, options)


def _foretold(
    planned: Plan, base: Checkpoint, fine_tuned: Checkpoint, options: CompressOptions, *, force: bool
) -> Plan:
    """The plan with the size of its file, whose saving is checked."""
    planned = with_file_bytes(planned, fine_tuned, options)
    check_saving(planned, base, fine_tuned, size=planned.file_bytes or 0, force=force)
    return planned


def _write(
    base: Checkpoint,
    fine_tuned: Checkpoint,
    fit: RunFit,
    output: Path,
    options: CompressOptions,
    progress: Staged,
    *,
    overwrite: bool,
    force: bool,
) -> tuple[Manifest, int, Mapping[str, int], Mapping[str, str]]:
    """Write the file, unless it saves too little.

    Returns its manifest, its size in bytes, the modes of the blocks of its exact modules, and the notes on modules.
    """
    planned = fit.plan
    reports: dict[str, ModuleReport] = {}
    blocks: Counter[str] = Counter()
    savings: list[int] = []
    with DeltaWriter(
        output,
        base=base.identity,
        fine_tuned=fine_tuned.identity,
        calibration=fit.calibration,
        overwrite=overwrite,
    ) as writer:
        done, total = 0, planned.full_bytes

        def made(module: PlannedModule) -> Written:
            return module_delta(module, base.tensors, fine_tuned.tensors, fit.modules.get(module.name), options)

        def held(module: PlannedModule) -> int:
            return _BYTES_IN_FLIGHT_PER_TENSOR * fine_tuned.tensors[module.name].size

        # One tensor is read and hashed while another is fitted.
        for found in ordered_map(made, planned.modules, cost=held, budget=_AHEAD_BYTES):
            name = found.delta.name
            writer.add(found.delta)
            blocks += count_blocks(found.delta)
            savings += [found.exact_saving] if found.exact_saving else []
            if found.report is not None:
                reports[name] = found.report
            done += fine_tuned.tensors[name].size
            progress("write", done, total)
        for name, alias in planned.tied:
            writer.tie(name, alias)
        for name in planned.dropped:
            writer.drop(name)
        for path, data in fine_tuned.assets():
            writer.add_asset(path, data)
        if planned.left_behind:
            writer.metadata[LEFT_BEHIND] = planned.left_behind
        writer.metadata[CONFIG_KEY] = options.canonical_json()
        writer.metadata[PLAN_KEY] = plan_text(planned)
        writer.metadata.update(fit.metadata)
        _add_report(writer, planned, reports, target_of(planned, options))
        _note_exact(savings, writer.file_size(), options)
        if saves(planned, planned.file_bytes or 0):  # otherwise the note was made, and it is forced
            check_saving(planned, base, fine_tuned, size=writer.file_size(), force=force)
        for checkpoint in (base, fine_tuned):
            checkpoint.tensors.check_unchanged()
        said = {name: report.note for name, report in reports.items() if report.note}
        return writer.finish(), writer.size, blocks, said


def _note_exact(savings: Sequence[int], size: int, options: CompressOptions) -> None:
    """Note where exact tensors would save a good part of the file. savings: of modules that they would make smaller."""
    if sum(savings) >= _EXACT_SAVING * size:
        how = "--exact auto, without a target" if options.has_target else "--exact auto"
        found = f"{counted(len(savings), 'tensor')} changed only in part"
        note(f"{found}; exact ({how}) would store them without loss, in about {sum(savings)} bytes less")


def _add_report(writer: DeltaWriter, planned: Plan, reports: Mapping[str, ModuleReport], target: int | None) -> None:
    """Add the report of the fit; without its notes, or not at all, where the file would exceed the target.

    The plan knows the size of the errors, but not which modules will have a note.
    """
    names = [module.name for module in planned.modules]
    lines = {n: (r.error, r.error_none, r.error_same, r.note) for n, r in reports.items()}
    whole = report_text(names, lines)
    for said in (whole, report_text(names, {n: (*line[:3], "") for n, line in lines.items()}), ""):
        writer.metadata.pop(REPORT_KEY, None)
        if said:
            writer.metadata[REPORT_KEY] = said
        if target is None or writer.file_size() <= target:
            break
    else:
        note(f"{writer.path}: {writer.file_size()} bytes, above the target of {target}")
    if said != whole:
        note(f"{writer.path}: the report of the fit lacks its notes or is left out, to keep the file within the target")


def _result(
    output: Path,
    manifest: Manifest,
    size: int,
    blocks: Mapping[str, int],
    notes: Mapping[str, str],
    fit: RunFit,
    options: CompressOptions,
) -> CompressResult:
    """The result for a written file; notes a fine-tune without any change."""
    encodings = count_encodings(module.encoding for module in manifest.modules)
    if encodings.get(Encoding.SAME.value, 0) == len(manifest.modules):
        note(f"{output}: holds no change, because every tensor is stored as the base's; check the pair, and the target")
    axes = Counter(component.axis.value for module in manifest.modules for component in module.components)
    return CompressResult(
        path=output,
        content_id=manifest.content_id,
        bytes=size,
        full_bytes=fit.plan.full_bytes,
        ratio=round(fit.plan.full_bytes / size, 4),
        fit=options.resolved_fit,
        module_count=len(manifest.modules),
        encodings=encodings,
        blocks=dict(blocks),
        prefer=options.prefer,
        axis_counts=dict(sorted(axes.items())),
        notes=dict(notes),
        calibration_samples=fit.calibration.samples if fit.calibration else 0,
        calibration_tokens=fit.tokens,
        distillation=manifest.metadata.get(DISTILLATION_KEY, ""),
        unread_tokens=fit.unread_tokens,
    )
