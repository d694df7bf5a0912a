"""The inputs of a fit on text: batches of samples, those that the model writes, and the digest of all inputs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from peraxis_format import DType, Safetensors, TensorInfo, __version__
from peraxis_tools.checkpoints.checkpoint import Checkpoint
from peraxis_tools.checkpoints.environment import check_causal, load_config, load_tokenizer, resolve_device
from peraxis_tools.checkpoints.vocabulary import check_ids
from peraxis_tools.compress.calibration.partition import calibrating
from peraxis_tools.compress.fit.moments.collector import TokenBatch
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan.estimate import GENERATED_SAMPLES
from peraxis_tools.compress.plan.plan import Plan
from peraxis_tools.compress.plan.stage_work import SampleCounts
from peraxis_tools.errors import ToolError
from peraxis_tools.texts.samples import Ids, Samples, load_samples

__all__ = [
    "GENERATED_TOGETHER",
    "TextInputs",
    "batches_of",
    "generated_count",
    "inputs_digest",
    "read_samples",
    "sampling_dtype",
    "text_inputs",
    "text_of",
]

GENERATED_TOGETHER: Final = 4  # batches of samples that are generated together
_SAMPLED: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class TextInputs:
    """The device, and the inputs of a fit on text beside the pair: configuration, tokenizer, samples of the text."""

    device: torch.device
    config: Any
    tokenizer: Any
    samples: Samples


def text_inputs(fine_tuned: Checkpoint, options: CompressOptions, *, asked: bool = False) -> TextInputs:
    """Read the inputs of a fit on text. Raises ToolError, and OptionError for a text that cannot be read.

    asked: whether the user gave the number of samples, so that a text that holds fewer is noted.
    """
    folder, label = fine_tuned.folder, fine_tuned.tensors.label
    if folder is None or options.calibration is None:
        raise ToolError(f"{label}: a fit on text needs the checkpoint's folder, with its tokenizer")
    device = resolve_device(options.device)
    config = load_config(folder)
    check_causal(config, label, remedy="compress it without text: --fit none")
    tokenizer = load_tokenizer(folder)
    samples = read_samples(options, tokenizer, asked=asked)
    check_ids(samples.ids, config.to_dict(), label)
    return TextInputs(device=device, config=config, tokenizer=tokenizer, samples=samples)


def read_samples(options: CompressOptions, tokenizer: Any, *, asked: bool = False) -> Samples:
    """The samples of the calibration text, for the fit and for distillation. asked: as in `text_inputs`."""
    return load_samples(
        options.calibration or (),
        tokenizer,
        samples=options.text_samples + options.distill_samples,
        length=options.sequence_length,
        seed=options.seed,
        text_column=options.text_column,
        asked=asked,
    )


def batches_of(fit: Ids, validation: Ids, size: int, device: torch.device) -> list[TokenBatch]:
    """The batches: those of the fit first, then the held-out ones."""
    batches = []
    for ids, validates in ((fit, False), (validation, True)):
        for start in range(0, len(ids), size):
            part = np.ascontiguousarray(ids[start : start + size])
            batches.append(TokenBatch(torch.from_numpy(part).to(device), validates))
    return batches


def inputs_digest(
    base: Safetensors,
    fine_tuned: Safetensors,
    config: Any,
    samples: Samples,
    options: CompressOptions,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """The digest of the inputs: tensors, the configuration, text, options, version.

    Of a tensor: name, dtype, shape and offset, size and time of its file, and some of its bytes. Copies of two
    fine-tunes may have files of equal sizes and times, and a file may be changed in place and its time restored.
    """
    digest = hashlib.sha256()
    for tensors in (base, fine_tuned):
        for file, infos in groupby(sorted(tensors.infos(), key=lambda info: (str(info.file), info.begin)), _file_of):
            status = file.stat()
            with open(file, "rb") as opened:
                for info in infos:
                    digest.update(f"{info.name}|{info.dtype.value}|{info.shape}|{info.begin}|".encode())
                    digest.update(f"{status.st_size}|{status.st_mtime_ns}\n".encode())
                    last = max(info.begin, info.end - _SAMPLED)
                    for start in sorted({info.begin, (info.begin + info.end) // 2, last}):
                        opened.seek(start)
                        digest.update(opened.read(min(_SAMPLED, info.end - start)))
    model = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    digest.update(json.dumps(model, sort_keys=True, default=str).encode())
    digest.update(f"{__version__}|{samples.digest}|{options.canonical_json()}|{device.type}|{dtype}".encode())
    return digest.hexdigest()


def _file_of(info: TensorInfo) -> Path:
    return info.file


def generated_count(plan: Plan, options: CompressOptions) -> int:
    """The number of generated samples: the option; or, if the checkpoint is not larger than the limit of hidden states,
    as many as of the text, for a fit without distillation 16 at most.
    """
    if options.generated_samples is not None:
        return options.generated_samples
    fits = plan.full_bytes <= options.hidden_limit and options.resolved_fit != "adamw"
    if not fits:
        return 0
    if options.distill_samples:
        return options.text_samples + options.distill_samples
    return min(GENERATED_SAMPLES, options.text_samples)


def sampling_dtype(plan: Plan, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """BF16 for a BF16 model where the device's instructions allow it: half the memory, and a third of the time."""
    own = {module.dtype for module in plan.modules if len(module.shape) > 1}
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if own == {DType.BF16} and fast and dtype is torch.float32 else dtype


def text_of(
    plan: Plan, options: CompressOptions, device: torch.device, dtype: torch.dtype, held: Samples | None
) -> SampleCounts:
    """The samples of a run, for its estimate. dtype: that the model computes in.

    held: those of the texts, which may hold fewer than the options ask for; None if they are not read yet.
    """
    samples, distilled, length = options.text_samples, options.distill_samples, options.sequence_length
    if held is not None:
        samples = sum(calibrating(count, options.calibration_share) for count in held.counts)
        distilled, length = len(held.ids) - samples, held.ids.shape[1]
    return SampleCounts(
        samples=samples,
        generated=generated_count(plan, options),
        length=length,
        value_bytes=dtype.itemsize,
        distilled=distilled,
        sampled_bytes=sampling_dtype(plan, device, dtype).itemsize,
        together=GENERATED_TOGETHER * options.batch_size,
    )
