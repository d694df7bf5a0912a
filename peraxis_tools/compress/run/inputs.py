"""The inputs of a fit on text: batches of samples, and the digest that binds the work folder to them."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from peraxis_format import Safetensors, __version__
from peraxis_tools.compress.fit.moments.collector import Batch
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.text import Ids, Samples

__all__ = ["batches_of", "inputs_digest"]


def batches_of(fit: Ids, validation: Ids, size: int, device: torch.device) -> list[Batch]:
    """The batches: those of the fit first, then the held-out ones."""
    batches = []
    for ids, validates in ((fit, False), (validation, True)):
        for start in range(0, len(ids), size):
            part = np.ascontiguousarray(ids[start : start + size])
            batches.append(Batch(torch.from_numpy(part).to(device), validates))
    return batches


def inputs_digest(
    base: Safetensors,
    fine_tuned: Safetensors,
    samples: Samples,
    options: CompressOptions,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """The digest of the inputs: tensors (name, shape, offset, size and time of their file), text, options, version."""
    digest = hashlib.sha256()
    for tensors in (base, fine_tuned):
        for info in tensors.infos():
            status = info.file.stat()
            digest.update(
                f"{info.name}|{info.dtype.value}|{info.shape}|{info.begin}|{status.st_size}|{status.st_mtime_ns}\n".encode()
            )
    digest.update(f"{__version__}|{samples.digest}|{options.canonical_json()}|{device.type}|{dtype}".encode())
    return digest.hexdigest()
