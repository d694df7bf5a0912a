"""X^T X in blocks, of which those below the diagonal are not computed; and the product of two matrices as vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

__all__ = ["add_gram", "dot", "gram_blocks"]

_BLOCKS: Final = 4


def gram_blocks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, X[:, columns]^T X[:, columns.start:]): the blocks on and right of the diagonal. x: [n, d]."""
    width = x.shape[1]
    step = max(1, -(-width // _BLOCKS))
    for start in range(0, width, step):
        stop = min(start + step, width)
        yield slice(start, stop), x[:, start:stop].t() @ x[:, start:]


def add_gram(total: Tensor, x: Tensor) -> None:
    """total += X^T X. total: [d, d], symmetric, in the dtype of x."""
    for columns, block in gram_blocks(x):
        total[columns, columns.start :] += block
        total[columns.stop :, columns] = total[columns, columns.stop :].t()


def dot(one: Tensor, other: Tensor) -> float:
    """tr(A B^T), summed in float64. one, other: A and B, of one shape."""
    return float(torch.sum(one * other, dtype=torch.float64))
