"""Low-rank factors of fused experts, for PEFT's target_parameters.

A fused parameter [E, O, I] has one rank R for all experts; each tensor of the checkpoint is rows [first, last) of one
expert's matrix. With D_e ~ B_e A_e, B_e [O, R] made of blocks of rows, A_e [R, I]:

    lora_A.weight [E R, I]    row (e, k)       = A_e[k]
    lora_B.weight [O, R E]    column (k, e)    = B_e[:, k]

The factors of two tensors in one expert (gate and up) are concatenated along R; unused entries are 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["ExpertFactors", "fused_factors", "wrapper_keys"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFactors:
    """left: float32 [rows, r]; right: [r, I]; for the rows of expert `index` that begin at `first`."""

    index: int
    first: int
    left: NDArray[np.float32]
    right: NDArray[np.float32]


def fused_factors(
    parts: Sequence[ExpertFactors], shape: tuple[int, int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """(lora_A.weight [E R, I], lora_B.weight [O, R E], R) of a parameter of this shape [E, O, I]."""
    experts, d_out, d_in = shape
    used = [0] * experts
    for part in parts:
        used[part.index] += part.left.shape[1]
    rank = max(used)
    a = np.zeros((experts, rank, d_in), np.float32)
    b = np.zeros((d_out, rank, experts), np.float32)
    at = [0] * experts
    for part in sorted(parts, key=lambda part: (part.index, part.first)):
        begin = at[part.index]
        end = at[part.index] = begin + part.left.shape[1]
        a[part.index, begin:end] = part.right
        b[part.first : part.first + part.left.shape[0], begin:end, part.index] = part.left
    return a.reshape(experts * rank, d_in), b.reshape(d_out, rank * experts), rank


def wrapper_keys(parameters: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], str]:
    """The path of PEFT's factors by (layer, parameter). PEFT wraps a layer once per parameter, in the layer's order.

    parameters: the adapted parameters of each layer, in the order of the layer. The last one is outermost.
    """
    keys = {}
    for layer, names in parameters.items():
        for depth, name in enumerate(reversed(names)):
            keys[layer, name] = layer + ".base_layer" * depth
    return keys
