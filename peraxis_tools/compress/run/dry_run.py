"""compress --dry-run: the bytes, memory and processor time of a run, before it.

Bytes are those that plan/size.py counts. Memory and operations of each stage follow from shapes (plan/estimate.py), and
a probe of a few seconds measures how fast this machine does such operations now, with the threads that the run would
have. Imports and opening are measured, because this process has done the same. Nothing is written, and of the weights
nothing is read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from peraxis_tools.checkpoints.checkpoint import Checkpoint, open_checkpoint
from peraxis_tools.checkpoints.vocabulary import check_ids
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan.budget import is_open, spend
from peraxis_tools.compress.plan.estimate import work_of
from peraxis_tools.compress.plan.pair_plan import plan_pair, with_text
from peraxis_tools.compress.plan.pairing import matched
from peraxis_tools.compress.plan.plan import Plan
from peraxis_tools.compress.plan.price import MASKS_MAX
from peraxis_tools.compress.plan.saving import note_saving
from peraxis_tools.compress.plan.size import with_file_bytes
from peraxis_tools.compress.run.memory import held_bytes, machine_memory
from peraxis_tools.deltas.module_counts import count_encodings
from peraxis_tools.errors import ToolError
from peraxis_tools.process.optional import require
from peraxis_tools.texts.samples import Source

if TYPE_CHECKING:
    from peraxis_tools.compress.plan.stage_work import SampleCounts, StageWork

__all__ = ["RunEstimate", "StageEstimate", "estimate_run"]

_LEFT_BY_A_MASK: Final = 0.36  # 1 - 2 / pi: what one mask leaves of the square of a normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate:
    """One stage: bytes beyond the imports, and processor seconds; None where nothing was measured."""

    name: str
    memory: int
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEstimate:
    """The result of a dry run. bytes, full_bytes: those of the file and of the fine-tuned tensors. memory: bytes at the
    peak, imports included. memory_available: those of this process and those that are free; None where the system does
    not say. upper_bound: the file can be smaller, as bytes of exact tensors follow from what changed.
    encodings: modules by encoding, as planned; exact ones count as full. seconds: processor seconds; None for another
    device than the CPU, and without a text.
    """

    bytes: int
    full_bytes: int
    ratio: float
    fit: str
    module_count: int
    encodings: dict[str, int]
    memory: int
    memory_available: int | None
    seconds: float | None
    stages: tuple[StageEstimate, ...]
    upper_bound: bool = False


def estimate_run(
    base: str | Path,
    fine_tuned: str | Path,
    *,
    options: CompressOptions,
    base_revision: str | None = None,
    fine_tuned_revision: str | None = None,
    base_id: str | None = None,
    force: bool = False,
) -> RunEstimate:
    """Estimate a run of `compress` on this pair. Raises ToolError as `compress` does before its work.

    A note says that the run would be refused without `force`, because it saves little.
    """
    if options.resolved_fit != "none":
        require(f"--fit {options.resolved_fit}", "torch", "transformers", "datasets", extra="compress")
    with (
        open_checkpoint(base, revision=base_revision) as opened_base,
        open_checkpoint(fine_tuned, revision=fine_tuned_revision) as opened,
    ):
        base_checkpoint, tuned = matched(opened_base, opened, base_id)
        asked = options.calibration_samples is not None
        options = with_text(options, tuned)
        planned = plan_pair(base_checkpoint, tuned, options)
        if options.has_target:
            planned = spend(planned, _typical_errors(planned, options), options)
        planned = with_file_bytes(planned, tuned, options)
        if not force:
            note_saving(planned, base_checkpoint, tuned, size=planned.file_bytes or 0)
        text, config = (None, None) if options.resolved_fit == "none" else _text(planned, tuned, options, asked=asked)
        spent = time.process_time()
    held, machine = held_bytes(), machine_memory()
    works = work_of(planned, options, text)
    seconds = None if text is None or config is None else _seconds(works, config, text, options)
    stages = tuple(
        StageEstimate(name=work.name, memory=work.memory, seconds=None if seconds is None else seconds[i])
        for i, work in enumerate(works)
    )
    if seconds is not None:
        stages = (StageEstimate(name="open", memory=0, seconds=spent), *stages)
    size = planned.file_bytes or planned.payload_bytes
    return RunEstimate(
        bytes=size,
        full_bytes=planned.full_bytes,
        ratio=round(planned.full_bytes / size, 4),
        fit=options.resolved_fit,
        module_count=len(planned.modules),
        encodings=count_encodings(module.encoding for module in planned.modules),
        memory=held + max(stage.memory for stage in stages),
        memory_available=None if machine is None else held + machine.available,
        seconds=None if seconds is None else sum(stage.seconds or 0.0 for stage in stages),
        stages=stages,
        upper_bound=options.exact is not None,
    )


def _typical_errors(plan: Plan, options: CompressOptions) -> dict[str, list[float]]:
    """Errors for 0 to 8 masks of the modules whose masks are open, before any is measured: equal for each weight."""
    return {
        module.name: [math.prod(module.shape) * _LEFT_BY_A_MASK**masks for masks in range(MASKS_MAX + 1)]
        for module in plan.modules
        if is_open(module, options)
    }


def _text(planned: Plan, tuned: Checkpoint, options: CompressOptions, *, asked: bool) -> tuple[SampleCounts, Any]:
    """The samples of a run, and the model's configuration. This imports and opens the same as a run."""
    import peraxis_tools.compress.run.calibrated  # noqa: F401  as a run does
    from peraxis_tools.checkpoints.environment import (
        check_causal,
        load_config,
        load_tokenizer,
        resolve_device,
        resolve_dtype,
    )
    from peraxis_tools.checkpoints.parameter_names import map_names
    from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
    from peraxis_tools.compress.run.inputs import read_samples, text_of
    from peraxis_tools.compress.run.probe import warm_up

    if tuned.folder is None:
        raise ToolError(f"{tuned.tensors.label}: a fit on text needs the checkpoint's folder, with its tokenizer")
    device = resolve_device(options.device)
    config = load_config(tuned.folder)
    check_causal(config, tuned.tensors.label, remedy="compress it without text: --fit none")
    dtype = resolve_dtype(options.compute_dtype)
    tokenizer = load_tokenizer(tuned.folder)
    held = read_samples(options, tokenizer, asked=asked) if _is_local(options) else None
    if held is not None:
        check_ids(held.ids, config.to_dict(), tuned.tensors.label)
    warm_up()
    map_names(LayerwiseModel(config, dtype=dtype, device=device).model, tuned.tensors)
    text = text_of(planned, options, device, dtype, held)
    return text, config if device.type == "cpu" else None


def _is_local(options: CompressOptions) -> bool:
    """Whether the calibration text is read without a download."""
    named = options.calibration or ()
    return all(Path(Source.parse(text).name).exists() for text in ((named,) if isinstance(named, str) else named))


def _seconds(works: Sequence[StageWork], config: Any, text: SampleCounts, options: CompressOptions) -> list[float]:
    """The processor seconds of each stage, with the threads and the library of products of a run."""
    import torch

    from peraxis_tools.compress.run.probe import probe_of
    from peraxis_tools.process.products import fast_products
    from peraxis_tools.process.threads import one_blas_thread

    with fast_products(), one_blas_thread():
        probe = probe_of(
            config,
            text,
            batch=options.batch_size,
            sampled=torch.bfloat16 if text.sampled_bytes < text.value_bytes else torch.float32,
            refine=options.resolved_fit == "refined",
        )
        return [probe.seconds(work) for work in works]
