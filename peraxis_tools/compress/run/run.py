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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from peraxis_format import Encoding, ShapeError
from peraxis_tools.checkpoints.checkpoint import Checkpoint, open_checkpoint
from peraxis_tools.checkpoints.completeness import note_missing
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan.budget import is_open, spend
from peraxis_tools.compress.plan.finite import check_pair_finite
from peraxis_tools.compress.plan.pair_plan import plan_pair, with_text
from peraxis_tools.compress.plan.pairing import matched
from peraxis_tools.compress.plan.plan import Plan
from peraxis_tools.compress.plan.price import prices
from peraxis_tools.compress.plan.saving import check_saving, note_left_at_base
from peraxis_tools.compress.plan.size import with_file_bytes
from peraxis_tools.compress.run.delta_file import WrittenDelta, read_delta, write_delta
from peraxis_tools.compress.run.streamed import StreamedFit
from peraxis_tools.compress.run.types import OPEN_STEPS, Fitting, RunFit
from peraxis_tools.deltas.metadata_keys import DISTILLATION_KEY
from peraxis_tools.deltas.module_counts import count_encodings
from peraxis_tools.display.notes import note
from peraxis_tools.display.progress import Staged, StagedProgress, watched_stages
from peraxis_tools.outputs.rules import claim_delta
from peraxis_tools.process.optional import require
from peraxis_tools.process.threads import one_blas_thread
from peraxis_tools.texts.samples import check_calibration

__all__ = ["CompressResult", "compress"]

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
    written: WrittenDelta | None = None
    if options.resolved_fit != "none":
        progress("open", 0, OPEN_STEPS)  # imports of the next line included
    with _fitting(base, fine_tuned, output, options, progress, asked=asked) as fitting:
        fitting.open()
        if options.has_target:
            planned = spend(planned, fitting.errors(planned), options)
            planned = _with_checked_size(planned, base, fine_tuned, options, force=force)
        elif options.spends_freely:
            planned = _spend_without_text(planned, base, fine_tuned, options, progress)
        note_left_at_base(planned, calibrated=options.resolved_fit != "none")
        if show_plan is not None:
            show_plan(planned)
        fit = fitting.fit(planned)
        if fitting.writes:
            written = write_delta(base, fine_tuned, fit, output, options, progress, overwrite=overwrite, force=force)
    return _result(output, written or read_delta(output, fit), fit, options)


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
        planned = _with_checked_size(planned, base, fine_tuned, options, force=force)
    if options.has_target or options.resolved_fit != "none":
        check_pair_finite(planned.modules, base.tensors, fine_tuned.tensors, progress)
    return planned


def _spend_without_text(
    planned: Plan, base: Checkpoint, fine_tuned: Checkpoint, options: CompressOptions, progress: Staged
) -> Plan:
    """The bytes of this plan, spent by the prices that need no text."""
    try:
        errors = prices([m for m in planned.modules if is_open(m, options)], base.tensors, fine_tuned.tensors)
    except ShapeError:  # values that are NaN or infinite; the check names the tensor and the index
        check_pair_finite(planned.modules, base.tensors, fine_tuned.tensors, progress)
        raise
    return with_file_bytes(spend(planned, errors, options), fine_tuned, options)


def _with_checked_size(
    planned: Plan, base: Checkpoint, fine_tuned: Checkpoint, options: CompressOptions, *, force: bool
) -> Plan:
    """The plan with the size of its file, whose saving is checked."""
    planned = with_file_bytes(planned, fine_tuned, options)
    check_saving(planned, base, fine_tuned, size=planned.file_bytes or 0, force=force)
    return planned


def _result(output: Path, written: WrittenDelta, fit: RunFit, options: CompressOptions) -> CompressResult:
    """The result for a written file; notes a fine-tune without any change."""
    manifest, size = written.manifest, written.size
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
        blocks=dict(written.blocks),
        prefer=options.prefer,
        axis_counts=dict(sorted(axes.items())),
        notes=dict(written.notes),
        calibration_samples=fit.calibration.samples if fit.calibration else 0,
        calibration_tokens=fit.tokens,
        distillation=manifest.metadata.get(DISTILLATION_KEY, ""),
        unread_tokens=fit.unread_tokens,
    )
