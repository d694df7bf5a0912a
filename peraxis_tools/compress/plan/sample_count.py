"""The number of samples of the calibration text, if none is asked for.

A fit of a matrix with d inputs estimates d x d moments, so the tokens grow with the widest matrix: 4/3 of its inputs of
the text, and as many of the model's own samples (16 at most). On SmolLM2-135M twice as many tokens lower the KL by a
third at most, and 50 samples of a text beside 16 of the model's own raise it (docs/figures.md). A small model takes
little time and gets more: up to 50 samples, as in the paper. A mixture of experts gets 50 too, because an expert reads
only a part of the tokens.

    samples = 4 to 50: max(4/3 widest, 2^38 / weights) / tokens of a sample, rounded up

Rejected: a constant, because 50 samples of 512 tokens take five processor minutes for 135 million weights; a count from
the vocabulary, because the tables refine only the rows that the text reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from peraxis_format import TensorInfo
from peraxis_tools.checkpoints.kinds import layer_of
from peraxis_tools.compress.options import SAMPLES_MOST

__all__ = ["sample_count"]

_EXPERTS: Final = "experts"  # in the names of their tensors
_LEAST: Final = 4  # some of them validate
_TOKENS_AN_INPUT: Final = 4 / 3
_WORK: Final = 2.0**38  # tokens times weights that any model gets


def sample_count(tensors: Iterable[TensorInfo], length: int) -> int:
    """Samples of `length` tokens for a model with these tensors."""
    weights, widest = 0, 0
    for info in tensors:
        weights += math.prod(info.shape)
        if len(info.shape) > 1 and layer_of(info.name) is not None:
            if _EXPERTS in info.name.split("."):
                return SAMPLES_MOST
            widest = max(widest, info.shape[-1])
    tokens = max(_TOKENS_AN_INPUT * widest, _WORK / max(1, weights))
    return max(_LEAST, min(SAMPLES_MOST, math.ceil(tokens / length)))
