"""sign_search compiled with numba: rows [first, last) of W, one after the other. Imported lazily.

For arrays see the interface: [d_out, n] for a block of n columns. Rows are independent, so they can be distributed over
threads in any way (the kernels release the GIL).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

__all__ = ["coordinate_descent_block", "gptq_signs_block"]

_ROWS: Final = 256  # rows that a thread takes at a time

_ROWS_PER_TASK = 8  # rows that share a pass over the factor
_MATRIX: Final = types.float32[:, ::1]
_MATRICES: Final = types.float32[:, :, ::1]
_MASKS: Final = types.boolean[:, :, ::1]


def _compiled(*arrays: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile for these types on import, and cache on disk if numba finds a folder that it may write."""
    signature = types.void(types.intp, types.intp, *arrays)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            kernel: Callable[..., Any] = njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:  # "cannot cache function": there is no such folder, so compile in every process
            kernel = njit(signature, nogil=True)(function)
        return kernel

    return decorate


@_compiled(_MATRIX, _MATRIX, _MATRIX, _MATRIX, _MASKS, _MATRIX)
def _gptq_signs(first: int, last: int, work: Any, block: Any, rows: Any, cols: Any, signs: Any, errors: Any) -> None:
    """See gptq_signs_block."""
    width = work.shape[1]
    error = np.empty(_ROWS_PER_TASK, np.float32)
    for start in range(first, last, _ROWS_PER_TASK):
        count = min(_ROWS_PER_TASK, last - start)
        for j in range(width):
            for i in range(count):
                r = start + i
                rest = work[r, j]
                for k in range(rows.shape[0]):
                    size = rows[k, r] * cols[k, j]
                    positive = rest >= 0
                    signs[k, r, j] = positive
                    rest = rest - size if positive else rest + size
                error[i] = rest / block[j, j]
                errors[r, j] = error[i]
            # LLVM vectorises slices that start at 0.
            factor = block[j, j + 1 :]
            for i in range(count):
                passed = error[i]
                later = work[start + i, j + 1 :]
                for column in range(len(later)):
                    later[column] -= passed * factor[column]


@_compiled(_MATRIX, _MATRIX, _MATRICES, _MATRIX)
def _coordinate_descent(first: int, last: int, gradient: Any, block: Any, values: Any, change: Any) -> None:
    """See coordinate_descent_block."""
    width = gradient.shape[1]
    for r in range(first, last):
        slope = gradient[r]
        for j in range(width):
            for k in range(values.shape[0]):
                q = values[k, r, j]
                if q * (slope[j] + q * block[j, j]) < 0:
                    values[k, r, j] = -q
                    step = q + q
                    change[r, j] += step
                    # Few signs are flipped, so work is done only for those.
                    row = block[j]
                    for column in range(width):
                        slope[column] += step * row[column]


def gptq_signs_block(*tensors: Tensor) -> None:
    """See the interface."""
    _in_threads(_gptq_signs, tensors)


def coordinate_descent_block(*tensors: Tensor) -> None:
    """See the interface."""
    _in_threads(_coordinate_descent, tensors)


def _in_threads(kernel: Callable[..., None], tensors: tuple[Tensor, ...]) -> None:
    """Run a kernel on rows in parallel; rows are independent."""
    arrays = [tensor.numpy() for tensor in tensors]
    height = arrays[0].shape[0]
    firsts = range(0, height, _ROWS)
    if len(firsts) <= 1 or torch.get_num_threads() == 1:
        kernel(0, height, *arrays)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda first: kernel(first, min(height, first + _ROWS), *arrays), firsts))
