"""sign_search on a GPU: one program processes a few rows of W through all columns of a block.

For arrays see the interface. Plain torch would start several kernels for each column and wait for them; here the rows
of a program stay in registers. Column j of a tile is read with a mask over all of its columns, which wastes work but
takes a hundredth of the time. Imported lazily.
"""

# Triton reads the annotations of a kernel: constants have one, other arguments must have none.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import Final

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

__all__ = [
    "COLUMNS",
    "ROWS",
    "coordinate_descent_block",
    "coordinate_descent_kernel",
    "gptq_signs_block",
    "gptq_signs_kernel",
]

COLUMNS: Final = 128  # columns of a tile, and so of a block
ROWS: Final = 16


@triton.jit
def gptq_signs_kernel(
    work, block, rows, cols, signs, errors, d_out,
    WIDTH: tl.constexpr, MASKS: tl.constexpr, ROWS_: tl.constexpr, COLUMNS_: tl.constexpr,
):  # fmt: skip
    """See gptq_signs_block."""
    r = tl.program_id(0) * ROWS_ + tl.arange(0, ROWS_)
    c = tl.arange(0, COLUMNS_)
    real = r < d_out
    inside = real[:, None] & (c < WIDTH)[None, :]
    tile = tl.load(work + r[:, None] * WIDTH + c[None, :], mask=inside, other=0.0)
    for j in range(WIDTH):
        rest = tl.sum(tl.where((c == j)[None, :], tile, 0.0), axis=1)
        for k in tl.static_range(MASKS):
            size = tl.load(rows + k * d_out + r, mask=real, other=0.0) * tl.load(cols + k * WIDTH + j)
            positive = rest >= 0
            tl.store(signs + (k * d_out + r) * WIDTH + j, positive.to(tl.uint8), mask=real)
            rest = tl.where(positive, rest - size, rest + size)
        error = rest / tl.load(block + j * WIDTH + j)
        tl.store(errors + r * WIDTH + j, error, mask=real)
        later = tl.load(block + j * WIDTH + c, mask=(c > j) & (c < WIDTH), other=0.0)
        tile -= error[:, None] * later[None, :]


@triton.jit
def coordinate_descent_kernel(
    gradient, block, values, change, d_out,
    WIDTH: tl.constexpr, MASKS: tl.constexpr, ROWS_: tl.constexpr, COLUMNS_: tl.constexpr,
):  # fmt: skip
    """See coordinate_descent_block."""
    r = tl.program_id(0) * ROWS_ + tl.arange(0, ROWS_)
    c = tl.arange(0, COLUMNS_)
    real = r < d_out
    inside = real[:, None] & (c < WIDTH)[None, :]
    place = r[:, None] * WIDTH + c[None, :]
    tile = tl.load(gradient + place, mask=inside, other=0.0)
    for j in range(WIDTH):
        row = tl.load(block + j * WIDTH + c, mask=c < WIDTH, other=0.0)
        own = tl.load(block + j * WIDTH + j)
        stepped = tl.zeros((ROWS_,), tl.float32)
        for k in tl.static_range(MASKS):
            value = values + (k * d_out + r) * WIDTH + j
            q = tl.load(value, mask=real, other=0.0)
            slope = tl.sum(tl.where((c == j)[None, :], tile, 0.0), axis=1)
            turns = q * (slope + q * own) < 0
            step = tl.where(turns, q + q, 0.0)
            tl.store(value, tl.where(turns, -q, q), mask=real)
            stepped += step
            tile += step[:, None] * row[None, :]
        tl.store(change + r * WIDTH + j, stepped, mask=real)
    tl.store(gradient + place, tile, mask=inside)


def gptq_signs_block(work: Tensor, block: Tensor, rows: Tensor, cols: Tensor, signs: Tensor, errors: Tensor) -> None:
    """See the interface; for contiguous tensors of at most COLUMNS columns."""
    d_out, width = work.shape
    gptq_signs_kernel[(triton.cdiv(d_out, ROWS),)](
        work, block, rows, cols, signs.view(torch.uint8), errors, d_out,
        WIDTH=width, MASKS=len(rows), ROWS_=ROWS, COLUMNS_=COLUMNS,
    )  # fmt: skip


def coordinate_descent_block(gradient: Tensor, block: Tensor, values: Tensor, change: Tensor) -> None:
    """See the interface; for contiguous tensors of at most COLUMNS columns."""
    d_out, width = gradient.shape
    coordinate_descent_kernel[(triton.cdiv(d_out, ROWS),)](
        gradient, block, values, change, d_out, WIDTH=width, MASKS=len(values), ROWS_=ROWS, COLUMNS_=COLUMNS
    )
