"""The use of each sample: the fit, validation of the fit, distillation, or validation of the distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peraxis_tools.text import Ids

__all__ = ["Parts", "partition"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The samples by use, each int64 [n, length]. Distillation also trains on all calibration samples."""

    fit: Ids
    validation: Ids
    distill: Ids
    distill_validation: Ids


def partition(sources: Sequence[Ids], *, calibration: float, validation: float) -> Parts:
    """Split each source into calibration (a share) and distillation, and each of these into training and validation.

    So every part has its share of every source. A part of one sample is not split.
    """
    parts: list[list[Ids]] = [[], [], [], []]
    for ids in sources:
        cut = round(calibration * len(ids))
        for i, part in enumerate((ids[:cut], ids[cut:])):
            validated = min(max(len(part) - 1, 0), int(np.ceil(validation * len(part))))
            parts[2 * i].append(part[: len(part) - validated])
            parts[2 * i + 1].append(part[len(part) - validated :])
    fit, held_out, train, train_validation = (np.concatenate(part) for part in parts)
    return Parts(
        fit=fit,
        validation=held_out,
        distill=np.concatenate([train, fit, held_out]),
        distill_validation=train_validation,
    )
