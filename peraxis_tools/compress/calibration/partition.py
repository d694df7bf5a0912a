"""The use of each sample: the fit, validation of the fit, distillation, or validation of the distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from peraxis_tools.texts.samples import Ids

__all__ = ["Halves", "Partition", "calibrating", "halves", "partition", "pieces_of"]

_PIECE: Final = 128  # tokens of a piece of a generated sample, about


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """The samples by use, each int64 [n, length]. Distillation also trains on all calibration samples.

    texts: all calibration samples, by source; several sources validate each other.
    """

    texts: tuple[Ids, ...]
    fit: Ids
    validation: Ids
    distill: Ids
    distill_validation: Ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    """The samples of the fit and of its validation, int64 [n, length]; crossed: two texts, each used for both."""

    fit: Ids
    validation: Ids
    crossed: bool


def halves(partition: Partition, *, crossed: bool) -> Halves:
    """Split the last of several texts (the samples that the fine-tuned model generates) from the others; a single text,
    or all texts if crossed is False, by its held-out samples.
    """
    texts = [ids for ids in partition.texts if len(ids)]
    if len(texts) < 2 or not crossed:
        return Halves(fit=partition.fit, validation=partition.validation, crossed=False)
    return Halves(fit=np.concatenate(texts[:-1]), validation=texts[-1], crossed=True)


def calibrating(count: int, share: float) -> int:
    """Return the number of samples of a source that calibrate: `share` of them, at least one."""
    return max(round(share * count), min(count, 1))


def partition(sources: Sequence[Ids], *, calibration: float, validation: float) -> Partition:
    """Split each source into calibration (a share) and distillation, and each of these into training and validation.

    So every use has its share of every source, and the calibration one sample of each at least. One sample alone is not
    split.
    """
    uses: list[list[Ids]] = [[], [], [], []]
    texts: list[Ids] = []
    for ids in sources:
        cut = calibrating(len(ids), calibration)
        texts.append(ids[:cut])
        for i, some in enumerate((ids[:cut], ids[cut:])):
            validated = min(max(len(some) - 1, 0), int(np.ceil(validation * len(some))))
            uses[2 * i].append(some[: len(some) - validated])
            uses[2 * i + 1].append(some[len(some) - validated :])
    fit, held_out, train, train_validation = (np.concatenate(each) for each in uses)
    return Partition(
        texts=tuple(texts),
        fit=fit,
        validation=held_out,
        distill=np.concatenate([train, fit, held_out]),
        distill_validation=train_validation,
    )


def pieces_of(length: int, *, start: int = 0) -> tuple[int, int]:
    """(pieces in a generated sample of `length` tokens, tokens of a piece). start: the longest start of a piece, of
    which the model continues at least as many tokens, if the sample has room for them.
    """
    count = max(1, min(round(length / _PIECE), length // max(1, 2 * start)))
    return count, -(-length // count)
