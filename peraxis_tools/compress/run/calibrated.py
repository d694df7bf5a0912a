"""A fit on text: open device, models, tokens and work folder; fit layer by layer (fit/); then distill (distill/)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peraxis_format import Axis, Calibration
from peraxis_tools.checkpoints.checkpoint import Checkpoint
from peraxis_tools.checkpoints.environment import resolve_dtype
from peraxis_tools.checkpoints.parameter_names import NameMap, map_names
from peraxis_tools.compress.calibration.generate import generate
from peraxis_tools.compress.calibration.partition import Partition, halves, partition
from peraxis_tools.compress.distill.distill import DistillOptions, distill
from peraxis_tools.compress.fit.adamw import ADAMW_EPOCHS
from peraxis_tools.compress.fit.fit import AUTO_AXES, FitOptions
from peraxis_tools.compress.fit.layerwise import LayerwiseCalibration
from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
from peraxis_tools.compress.model.weights import Weights
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan.budget import is_open
from peraxis_tools.compress.plan.estimate import SENSITIVITY_SAMPLES, work_of
from peraxis_tools.compress.plan.plan import Plan
from peraxis_tools.compress.plan.sensitivity import fisher_errors, in_pieces
from peraxis_tools.compress.run.continuing import continued
from peraxis_tools.compress.run.distributed import Processes
from peraxis_tools.compress.run.inputs import (
    GENERATED_TOGETHER,
    TextInputs,
    batches_of,
    generated_count,
    inputs_digest,
    sampling_dtype,
    text_inputs,
    text_of,
)
from peraxis_tools.compress.run.memory import check_memory, held_bytes, machine_memory
from peraxis_tools.compress.run.types import OPEN_STEPS, FittedModule, RunFit
from peraxis_tools.compress.run.work_folder import WorkFolder
from peraxis_tools.deltas.metadata_keys import DISTILLATION_KEY
from peraxis_tools.display.progress import Staged
from peraxis_tools.display.shown import counted
from peraxis_tools.errors import ToolError
from peraxis_tools.process.command_line import Terminated
from peraxis_tools.process.heap import trim_heap
from peraxis_tools.process.products import fast_products
from peraxis_tools.process.quiet import quiet_transformers
from peraxis_tools.process.threads import limit_torch
from peraxis_tools.texts.samples import Samples, unread_tokens

__all__ = ["CalibratedFit"]


class CalibratedFit:
    """A Fitting (types.py) on the calibration text. Models are opened at first use. asked: as in `text_inputs`."""

    def __init__(
        self,
        base: Checkpoint,
        fine_tuned: Checkpoint,
        output: Path,
        options: CompressOptions,
        progress: Staged,
        *,
        asked: bool = False,
    ) -> None:
        self._base, self._fine_tuned, self._output = base, fine_tuned, output
        self._options, self._progress, self._asked = options, progress, asked
        self._quiet = ExitStack()
        self._given: TextInputs | None = None
        self._opened: _CalibratedRun | None = None

    @property
    def writes(self) -> bool:
        """Whether this process writes the file."""
        return self._opened is None or self._opened.processes.is_main_process

    def open(self) -> None:
        """Read the text and the tokenizer."""
        self._given = text_inputs(self._fine_tuned, self._options, asked=self._asked)
        self._progress("open", 1, OPEN_STEPS)

    def errors(self, plan: Plan) -> Mapping[str, Sequence[float]]:
        """The KL that each number of components leaves (sensitivity.py); kept in the work folder."""
        return _sensitivities(self._run(plan), self._options, self._progress)

    def fit(self, plan: Plan) -> RunFit:
        """Fit layer by layer, then distill end to end if the options ask for it."""
        options = self._options
        run = replace(self._run(plan), plan=plan)
        modules: Mapping[str, FittedModule] = _layerwise(run, options, self._progress)
        metadata: dict[str, str] = {}
        if options.distill_samples:
            if run.processes.is_main_process:
                modules, metadata = _distilled(run, modules, options, self._progress)
            run.processes.barrier()
        ids = run.samples.ids
        calibration = Calibration(
            digest=run.samples.digest,
            samples=len(ids),
            seed=options.seed,
            sequence_length=ids.shape[1],
            source=run.samples.source,
        )
        return RunFit(
            plan=plan,
            modules=modules,
            calibration=calibration,
            tokens=ids.size,
            unread_tokens=tuple(unread_tokens(run.tokenizer, ids)),
            metadata=metadata,
        )

    def _run(self, plan: Plan) -> _CalibratedRun:
        if self._opened is None:
            self._given = self._given or text_inputs(self._fine_tuned, self._options)
            # Kept before the samples are generated, so that an interrupt removes the folder or says what it keeps.
            opened = self._opened = _open_run(
                self._base, self._fine_tuned, plan, self._output, self._given, self._options
            )
            self._progress("open", OPEN_STEPS, OPEN_STEPS)
            self._quiet.enter_context(continued(opened.work, notes=opened.processes.is_main_process))
            count = generated_count(plan, self._options)
            self._opened = _with_generated(opened, count, self._options, self._progress) if count else opened
        return self._opened

    def _kept(self) -> str | None:
        if self._opened is None or (finished := self._opened.work.finished()) is None:
            return None
        return f"{self._opened.work.path} keeps {finished}; the same command continues"

    def __enter__(self) -> CalibratedFit:
        self._quiet.enter_context(quiet_transformers())
        self._quiet.enter_context(fast_products())
        limit_torch()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._quiet.close()
        if isinstance(error, (KeyboardInterrupt, Terminated, MemoryError, OSError)) and (kept := self._kept()):
            error.add_note(kept)
        if self._opened is not None:
            if error is None:
                self._opened.processes.close()
            if self._opened.processes.is_main_process:
                self._opened.work.remove(unless_used=error is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _CalibratedRun:
    """The objects that all steps of a run share."""

    base: Checkpoint
    fine_tuned: Checkpoint
    plan: Plan
    config: Any
    tokenizer: Any
    names: NameMap
    samples: Samples
    partition: Partition
    work: WorkFolder
    processes: Processes
    device: torch.device
    dtype: torch.dtype

    def models(self) -> tuple[LayerwiseModel, LayerwiseModel]:
        """A teacher and a student, both without weights."""
        one, two = (LayerwiseModel(self.config, dtype=self.dtype, device=self.device) for _ in range(2))
        return one, two

    def weights(self) -> Weights:
        """The pair's tensors, without fitted components."""
        return Weights(
            plan=self.plan,
            base=self.base.tensors,
            fine_tuned=self.fine_tuned.tensors,
            names=self.names,
            fitted={},
            device=self.device,
        )


def _open_run(
    base: Checkpoint,
    fine_tuned: Checkpoint,
    plan: Plan,
    output: Path,
    given: TextInputs,
    options: CompressOptions,
) -> _CalibratedRun:
    """Open name map and work folder."""
    device, config, text = given.device, given.config, given.samples
    processes = Processes(device)
    dtype = resolve_dtype(options.compute_dtype)
    if device.type == "cpu":
        works = work_of(plan, options, text_of(plan, options, device, dtype, text))
        check_memory(works, options, held=held_bytes(), machine=machine_memory())
    names = map_names(LayerwiseModel(config, dtype=dtype, device=device).model, fine_tuned.tensors)
    digest = inputs_digest(base.tensors, fine_tuned.tensors, config, text, options, device, dtype)
    is_main, threads = processes.is_main_process, torch.get_num_threads()
    work = WorkFolder(output, digest, resume=options.resume, threads=threads, is_main_process=is_main)
    processes.barrier()
    return _CalibratedRun(
        base=base,
        fine_tuned=fine_tuned,
        plan=plan,
        config=config,
        tokenizer=given.tokenizer,
        names=names,
        samples=text,
        partition=partition(text.by_source, calibration=options.calibration_share, validation=options.held_out),
        work=work,
        processes=processes,
        device=device,
        dtype=dtype,
    )


def _with_generated(run: _CalibratedRun, count: int, options: CompressOptions, progress: Staged) -> _CalibratedRun:
    """The run with samples that the fine-tuned model generates; they are saved in the work folder."""
    length = run.samples.ids.shape[1]
    ids = run.work.load_array("generated")
    if ids is None and run.processes.is_main_process:
        weights = run.weights()
        teacher = LayerwiseModel(run.config, dtype=sampling_dtype(run.plan, run.device, run.dtype), device=run.device)
        weights.fill_whole(teacher, weights.teacher)
        ids = generate(
            teacher,
            run.tokenizer,
            samples=count,
            length=length,
            seed=options.seed,
            batch_size=GENERATED_TOGETHER * options.batch_size,
            progress=progress,
        )
        run.work.save_array("generated", ids)
        del teacher
        trim_heap()
    run.processes.barrier()
    if ids is None:
        ids = run.work.load_array("generated")
    if ids is None:
        raise ToolError(f"{run.work.path}: the generated samples are not there; run again with --no-resume")
    share = options.calibration_share
    return replace(
        run,
        samples=replace(
            run.samples,
            ids=np.concatenate([run.samples.ids, ids]),
            source=f"{run.samples.source}; {len(ids)} samples of the fine-tuned model",
            counts=(*run.samples.counts, len(ids)),
        ),
        partition=partition([*run.samples.by_source, ids], calibration=share, validation=options.held_out),
    )


def _sensitivities(run: _CalibratedRun, options: CompressOptions, progress: Staged) -> Mapping[str, Sequence[float]]:
    errors = run.work.load_text("sensitivity")
    if errors is None and run.processes.is_main_process:
        teacher, _ = run.models()
        weights = run.weights()
        weights.fill_whole(teacher, weights.teacher)
        # Every so many: samples stand in the order of their sources.
        chosen = run.partition.fit[:: -(-len(run.partition.fit) // SENSITIVITY_SAMPLES)]
        samples = torch.from_numpy(in_pieces(chosen)).to(run.device)
        open_modules = [module for module in run.plan.modules if is_open(module, options)]
        errors = fisher_errors(teacher, weights, open_modules, samples, seed=options.seed, progress=progress)
        run.work.save_text("sensitivity", errors)
    run.processes.barrier()
    return errors if errors is not None else run.work.load_text("sensitivity") or {}


def _layerwise(run: _CalibratedRun, options: CompressOptions, progress: Staged) -> Mapping[str, FittedModule]:
    teacher, student = run.models()
    text = halves(run.partition, crossed=options.resolved_fit != "adamw")
    return LayerwiseCalibration(
        plan=run.plan,
        base=run.base.tensors,
        fine_tuned=run.fine_tuned.tensors,
        teacher=teacher,
        student=student,
        names=run.names,
        batches=batches_of(text.fit, text.validation, options.batch_size, run.device),
        crossed=text.crossed,
        options=_fit_options(options, len(run.partition.fit)),
        work=run.work,
        processes=run.processes,
        hidden_limit=options.hidden_limit,
        progress=progress,
    ).run()


def _distilled(
    run: _CalibratedRun,
    modules: Mapping[str, FittedModule],
    options: CompressOptions,
    progress: Staged,
) -> tuple[Mapping[str, FittedModule], dict[str, str]]:
    """Distill the modules end to end. Returns them and the losses."""
    done = run.work.load("distilled")
    if done is not None:
        return {module.name: module for module in done}, run.work.load_text("distilled") or {}
    teacher, student = run.models()
    train, validation = (
        torch.from_numpy(np.ascontiguousarray(ids)).to(run.device)
        for ids in (run.partition.distill, run.partition.distill_validation)
    )
    result = distill(
        weights=run.weights(),
        teacher=teacher,
        student=student,
        modules=modules,
        samples=train,
        validation=validation,
        options=DistillOptions(
            epochs=options.distill_epochs,
            lr=options.distill_lr,
            sign_lr=options.distill_sign_lr,
            full_lr=options.distill_full_lr,
            loss=options.distill_loss,
            batch_size=options.distill_batch_size,
            seed=options.seed,
            logits_limit=options.logits_limit,
        ),
        work=run.work,
        progress=progress,
    )
    extent = f"{counted(len(train), 'sample')}, {counted(result.steps, 'step')}"
    losses = f"held-out {options.distill_loss}: {result.before:.6g} -> {result.after:.6g}"
    text = {DISTILLATION_KEY: f"{extent}, {losses}"}
    run.work.save_text("distilled", text)
    run.work.save("distilled", list(result.modules.values()))
    return result.modules, text


def _fit_options(options: CompressOptions, fit_samples: int) -> FitOptions:
    adamw = options.resolved_fit == "adamw"
    return FitOptions(
        axes=(Axis(options.axis),) if options.axis != "auto" else (Axis.ROW, Axis.COL) if adamw else AUTO_AXES,
        refine=options.resolved_fit == "refined",
        adamw_steps=ADAMW_EPOCHS * fit_samples if adamw else 0,
        rounds=options.refine_rounds,
    )
