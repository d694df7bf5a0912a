"""Everything that a fit on text needs before and around the procedure: device, models, tokens, work folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peraxis_format import Axis, Calibration, Safetensors
from peraxis_tools.checkpoint import Checkpoint
from peraxis_tools.compress.calibration import Samples, load_samples
from peraxis_tools.compress.distill import DistillOptions, distill
from peraxis_tools.compress.fit import AUTO_AXES, FitOptions
from peraxis_tools.compress.names import map_names
from peraxis_tools.compress.options import CompressOptions, OptionError
from peraxis_tools.compress.plan import Plan
from peraxis_tools.compress.procedure import Batch, Procedure
from peraxis_tools.compress.skeleton import Skeleton
from peraxis_tools.compress.types import FittedModule, RunFit
from peraxis_tools.compress.weights import Weights
from peraxis_tools.compress.workfolder import WorkFolder
from peraxis_tools.errors import ToolError

__all__ = ["batches_of", "calibrated_fit", "resolve_device", "resolve_dtype"]


def calibrated_fit(
    base: Checkpoint,
    fine_tuned: Checkpoint,
    plan: Plan,
    output: Path,
    options: CompressOptions,
    progress: Callable[[str, int, int], None],
) -> RunFit:
    """Fit every module of the plan on the calibration text."""
    if fine_tuned.folder is None or options.calibration is None:
        raise ToolError(f"{fine_tuned.tensors.label}: a fit on text needs the checkpoint's folder, with its tokenizer")
    device = resolve_device(options.device)
    with quiet_transformers():
        samples = _samples(fine_tuned.folder, options)
        config = _config(fine_tuned.folder)
        dtype = resolve_dtype(options.compute_dtype, device, config)
        teacher, student = (Skeleton(config, dtype=dtype, device=device) for _ in range(2))
        names = map_names(student.model, fine_tuned.tensors)
        calibrating = replace(samples, ids=samples.ids[: options.calibration_samples])
        digest = _inputs_digest(base.tensors, fine_tuned.tensors, samples, options, device, dtype)
        work = WorkFolder(output, digest, resume=options.resume)
        procedure = Procedure(
            plan=plan,
            base=base.tensors,
            fine_tuned=fine_tuned.tensors,
            teacher=teacher,
            student=student,
            names=names,
            batches=batches_of(calibrating, options, device),
            options=_fit_options(options),
            work=work,
            hidden_limit=options.hidden_limit,
            progress=progress,
        )
        modules = procedure.run()
        metadata = {}
        if options.distill_samples:
            del procedure, teacher, student
            modules, metadata = _distilled(plan, base, fine_tuned, modules, samples, config, options, work, progress)
    return RunFit(
        plan=plan,
        modules=modules,
        calibration=Calibration(
            digest=samples.digest,
            samples=len(samples.ids),
            seed=samples.seed,
            sequence_length=samples.ids.shape[1],
            source=samples.source,
        ),
        tokens=samples.ids.size,
        metadata=metadata,
        work=work.path,
    )


def _distilled(
    plan: Plan,
    base: Checkpoint,
    fine_tuned: Checkpoint,
    modules: Mapping[str, FittedModule],
    samples: Samples,
    config: Any,
    options: CompressOptions,
    work: WorkFolder,
    progress: Callable[[str, int, int], None],
) -> tuple[Mapping[str, FittedModule], dict[str, str]]:
    """The modules after end-to-end distillation on the samples behind those of calibration, and its losses."""
    done = work.load("distilled")
    if done is not None:
        return {module.name: module for module in done}, work.load_text("distilled")
    device = resolve_device(options.device)
    dtype = torch.float32 if device.type == "cpu" else resolve_dtype(options.compute_dtype, device, config)
    teacher, student = (Skeleton(config, dtype=dtype, device=device) for _ in range(2))
    names = map_names(student.model, fine_tuned.tensors)
    weights = Weights(
        plan=plan, base=base.tensors, fine_tuned=fine_tuned.tensors, names=names, fitted={}, device=device
    )
    rest = replace(samples, ids=samples.ids[options.calibration_samples :])
    if not len(rest.ids):
        raise ToolError(f"calibration {options.calibration}: too little text to distil after calibration; give more")
    train, held_out = (torch.from_numpy(np.ascontiguousarray(ids)).to(device) for ids in rest.split(options.held_out))
    result = distill(
        weights=weights,
        teacher=teacher,
        student=student,
        modules=modules,
        samples=train,
        held_out=held_out,
        options=DistillOptions(
            epochs=options.distill_epochs,
            lr=options.distill_lr,
            sign_lr=options.distill_sign_lr,
            loss=options.distill_loss,
            batch_size=options.batch_size,
            seed=options.seed,
            logits_limit=options.logits_limit,
        ),
        progress=progress,
    )
    text = {"peraxis.distillation": f"held-out {options.distill_loss}: {result.before:.6g} -> {result.after:.6g}"}
    work.save_text("distilled", text)
    work.save("distilled", list(result.modules.values()))
    return result.modules, text


def _fit_options(options: CompressOptions) -> FitOptions:
    axes = AUTO_AXES if options.axis == "auto" else (Axis(options.axis),)
    return FitOptions(axes=axes, refine=options.resolved_fit == "refined", rounds=options.refine_rounds)


def _samples(folder: Path, options: CompressOptions) -> Samples:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ToolError(f"{folder}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None
    if options.calibration is None:
        raise OptionError("give --calibration")
    return load_samples(
        options.calibration,
        tokenizer,
        samples=options.calibration_samples + options.distill_samples,
        length=options.sequence_length,
        seed=options.seed,
        text_column=options.text_column,
    )


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ToolError(f"{folder}: its config.json cannot be loaded: {str(error).splitlines()[0]}") from None


def batches_of(samples: Samples, options: CompressOptions, device: torch.device) -> list[Batch]:
    """Fit batches, then held-out ones."""
    batches = []
    for ids, held_out in zip(samples.split(options.held_out), (False, True), strict=True):
        for start in range(0, len(ids), options.batch_size):
            part = np.ascontiguousarray(ids[start : start + options.batch_size])
            batches.append(Batch(torch.from_numpy(part).to(device), held_out))
    return batches


def resolve_device(name: str) -> torch.device:
    """The device that `auto` or a name stands for. Raises OptionError for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"device {name}: {str(error).splitlines()[0]}") from None
    return device


def resolve_dtype(name: str, device: torch.device, config: Any) -> torch.dtype:
    """What blocks are computed in. auto: float32 on a CPU, the model's own dtype elsewhere.

    Weights are those of the file, rounded to their dtype, whatever this is.
    """
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    own = getattr(config, "dtype", None)
    return own if device.type != "cpu" and isinstance(own, torch.dtype) else torch.float32


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers comments on configurations; that is not for our users."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _inputs_digest(
    base: Safetensors,
    fine_tuned: Safetensors,
    samples: Samples,
    options: CompressOptions,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """What a work folder is bound to: tensors (by name, shape, place, size and time of their file), text, options."""
    digest = hashlib.sha256()
    for tensors in (base, fine_tuned):
        for info in tensors.infos():
            status = info.file.stat()
            digest.update(
                f"{info.name}|{info.dtype.value}|{info.shape}|{info.begin}|{status.st_size}|{status.st_mtime_ns}\n".encode()
            )
    digest.update(f"{samples.digest}|{options.canonical_json()}|{device.type}|{dtype}".encode())
    return digest.hexdigest()
