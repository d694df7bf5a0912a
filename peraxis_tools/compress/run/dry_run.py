"""compress --dry-run: the bytes, memory and processor time of a run, before it.

Bytes are those that plan/size.py counts. Memory and operations of each stage follow from shapes (plan/estimate.py); the
imports' memory is this process's own after importing. A probe of a few seconds measures how fast this machine does such
operations now, with the threads that the run would have. Nothing is written, and of the weights nothing is read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from peraxis_tools.checkpoint import Checkpoint, open_checkpoint
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan.casts import with_casts
from peraxis_tools.compress.plan.estimate import GENERATED_SAMPLES, StageWork, Text, fit_operations, work_of
from peraxis_tools.compress.plan.pairing import matched, tied_pairs
from peraxis_tools.compress.plan.plan import Plan, plan
from peraxis_tools.compress.plan.size import foretold
from peraxis_tools.optional import require
from peraxis_tools.positions import checked_length

__all__ = ["Foretold", "StageForetold", "foretell"]

_PROBE_SECONDS: Final = 0.5
_PROBE_TOKENS: Final = 2048
_PROBE_WIDTH: Final = 768


@dataclass(frozen=True, slots=True, kw_only=True)
class StageForetold:
    """One stage: bytes beyond the imports, and processor seconds; None where nothing was measured."""

    name: str
    memory: int
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Foretold:
    """The result of a dry run. size, full_size: bytes of the file and of the fine-tuned tensors. memory: bytes at the
    peak, imports included. seconds: processor seconds; None for another device than the CPU, and without a text.
    """

    size: int
    full_size: int
    ratio: float
    fit: str
    modules: int
    signed: int
    memory: int
    seconds: float | None
    stages: tuple[StageForetold, ...]


def foretell(
    base: str | Path,
    fine_tuned: str | Path,
    *,
    options: CompressOptions,
    base_revision: str | None = None,
    fine_tuned_revision: str | None = None,
    base_id: str | None = None,
) -> Foretold:
    """What compressing this pair with these options takes. Raises ToolError as `compress` does before its work."""
    if options.resolved_fit != "none":
        require(f"--fit {options.resolved_fit}", "torch", "transformers", "datasets", extra="compress")
    with (
        open_checkpoint(base, revision=base_revision) as opened_base,
        open_checkpoint(fine_tuned, revision=fine_tuned_revision) as opened,
    ):
        base_checkpoint, tuned = matched(opened_base, opened, base_id)
        if options.resolved_fit != "none":
            length = checked_length(tuned.config(), options.sequence_length, tuned.tensors.label)
            options = replace(options, sequence_length=length)
        planned = plan(
            fine_tuned={info.name: info for info in tuned.tensors.infos()},
            base={info.name: info for info in base_checkpoint.tensors.infos()},
            options=options,
            tied=tied_pairs(tuned.tensors),
        )
        planned = with_casts(planned, base_checkpoint.tensors, tuned.tensors)
        planned = foretold(planned, base_checkpoint, tuned, options)
        text, speed = (None, None) if options.resolved_fit == "none" else _text(planned, tuned, options)
    stages = tuple(_stage(work, speed) for work in work_of(planned, options, text))
    size = planned.file_bytes or planned.payload_bytes
    return Foretold(
        size=size,
        full_size=planned.full_bytes,
        ratio=round(planned.full_bytes / size, 4),
        fit=options.resolved_fit,
        modules=len(planned.modules),
        signed=sum(1 for module in planned.modules if module.components),
        memory=_held() + max(stage.memory for stage in stages),
        seconds=None if speed is None else sum(stage.seconds or 0.0 for stage in stages),
        stages=stages,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Speed:
    """Of this machine, for each processor second: operations of products and fits, bytes of weights read."""

    products: float
    fits: float
    reads: float


def _text(planned: Plan, tuned: Checkpoint, options: CompressOptions) -> tuple[Text, _Speed | None]:
    """What would be read, and the probe."""
    # What a run imports, for its memory.
    import datasets  # noqa: F401
    import transformers  # noqa: F401

    from peraxis_tools.environment import load_config, resolve_device, resolve_dtype

    device = resolve_device(options.device)
    value_bytes = 4
    if tuned.folder is not None:
        value_bytes = resolve_dtype(options.compute_dtype, device, load_config(tuned.folder)).itemsize
    weights = sum(math.prod(module.shape) for module in planned.modules)
    fits = weights * value_bytes <= options.hidden_limit and options.resolved_fit != "adamw"
    generated = options.generated_samples
    if generated is None:
        generated = GENERATED_SAMPLES if fits else 0
    text = Text(
        samples=options.calibration_samples,
        generated=generated,
        length=options.sequence_length,
        value_bytes=value_bytes,
    )
    return text, _probe(options) if device.type == "cpu" else None


def _stage(work: StageWork, speed: _Speed | None) -> StageForetold:
    if speed is None:
        return StageForetold(name=work.name, memory=work.memory, seconds=None)
    seconds = work.products / speed.products + work.fits / speed.fits + work.reads / speed.reads
    return StageForetold(name=work.name, memory=work.memory, seconds=seconds)


def _probe(options: CompressOptions) -> _Speed:
    import torch

    from peraxis_tools.compress.fit.choice import fit_matrices
    from peraxis_tools.compress.fit.fit import FitOptions, Matrix
    from peraxis_tools.compress.fit.moments.sums import Moments, Statistics

    width = _PROBE_WIDTH
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_TOKENS, width, generator=generator)
    weights = torch.randn(width, 4 * width, generator=generator)
    large = torch.randn(width, 32 * width, generator=generator)
    fine_tuned = torch.randn(width, width, generator=generator)
    matrix = Matrix(base=torch.zeros_like(fine_tuned), fine_tuned=fine_tuned, dtype=torch.float32)
    refine = options.resolved_fit == "refined"

    def fit() -> None:
        halves = [Moments.zeros(width, paired=False, validates=False) for _ in range(2)]
        for moments in halves:
            moments.add(x)
        statistics = Statistics(fit=halves[0], validation=halves[1], crossed=True)
        fit_matrices([matrix], statistics=statistics, options=FitOptions(refine=refine))

    fit()  # compiles
    return _Speed(
        products=8.0 * _PROBE_TOKENS * width**2 / _seconds(lambda: x @ weights),
        fits=fit_operations(width, width, 1) / _seconds(fit),
        reads=large.numel() * 4.0 / _seconds(lambda: x[:16] @ large),
    )


def _seconds(action: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    action()
    begin, calls = time.process_time(), 0
    while calls == 0 or time.process_time() - begin < _PROBE_SECONDS:
        action()
        calls += 1
    return (time.process_time() - begin) / calls


def _held() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)
