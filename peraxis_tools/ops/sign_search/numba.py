"""The block steps of signs.py, compiled: rows [first, last) of W, one after the other. Imported lazily.

Arrays as in signs.py: [d_out, n] for a block of n columns. What happens to one row does not depend on another, so rows
can be spread over threads (the kernels release the GIL) in any way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba import njit, types

__all__ = ["COORDINATE_DESCENT", "GPTQ_SIGNS"]

ROWS_PER_TASK = 8  # rows that share a pass over the factor: their errors are known before the next column needs them
_MATRIX: Final = types.float32[:, ::1]
_MATRICES: Final = types.float32[:, :, ::1]
_MASKS: Final = types.boolean[:, :, ::1]


def _compiled(*arrays: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiled for these types on import, and kept on disk where numba finds a folder that it may write."""
    signature = types.void(types.intp, types.intp, *arrays)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            kernel: Callable[..., Any] = njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:  # "cannot cache function": no such folder, so compile in every process
            kernel = njit(signature, nogil=True)(function)
        return kernel

    return decorate


@_compiled(_MATRIX, _MATRIX, _MATRIX, _MATRIX, _MASKS, _MATRIX)
def GPTQ_SIGNS(  # noqa: N802
    first: int, last: int, work: Any, block: Any, rows: Any, cols: Any, signs: Any, errors: Any
) -> None:
    """See signs._gptq_signs_block."""
    width = work.shape[1]
    error = np.empty(ROWS_PER_TASK, np.float32)
    for start in range(first, last, ROWS_PER_TASK):
        count = min(ROWS_PER_TASK, last - start)
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
            # Slices that start at 0: what LLVM turns into vector operations.
            factor = block[j, j + 1 :]
            for i in range(count):
                passed = error[i]
                later = work[start + i, j + 1 :]
                for column in range(len(later)):
                    later[column] -= passed * factor[column]


@_compiled(_MATRIX, _MATRIX, _MATRICES, _MATRIX)
def COORDINATE_DESCENT(first: int, last: int, gradient: Any, block: Any, values: Any, change: Any) -> None:  # noqa: N802
    """See signs._coordinate_descent_block."""
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
                    # Few signs are turned, so work is done only where one is.
                    row = block[j]
                    for column in range(width):
                        slope[column] += step * row[column]
