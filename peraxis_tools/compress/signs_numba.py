"""The block steps of signs.py, compiled: vector operations over rows [first, last). Imported lazily.

Arrays as in signs.py: [n, d_out] for a block of n columns, one row of W in each column of the array. What happens to
one row does not depend on another, so rows can be spread over threads (the kernels release the GIL) in any way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

__all__ = ["DESCEND", "FEEDBACK"]


@njit(nogil=True, cache=True)
def FEEDBACK(  # noqa: N802
    first: int, last: int, work: Any, near: Any, rows: Any, cols: Any, signs: Any, errors: Any
) -> None:
    """See signs._feedback_block."""
    width = work.shape[0]
    for j in range(width):
        for r in range(first, last):
            rest = work[j, r]
            for k in range(rows.shape[0]):
                size = rows[k, r] * cols[k, j]
                positive = rest >= 0
                signs[k, j, r] = positive
                rest = rest - size if positive else rest + size
            errors[j, r] = rest / near[j, j]
        for column in range(j + 1, width):
            factor = near[j, column]
            for r in range(first, last):
                work[column, r] -= factor * errors[j, r]


@njit(nogil=True, cache=True)
def DESCEND(  # noqa: N802
    first: int, last: int, gradient: Any, near: Any, values: Any, turned: Any, change: Any
) -> None:
    """See signs._descend_block."""
    width = gradient.shape[0]
    step = np.empty(last - first, np.float32)
    for j in range(width):
        for k in range(values.shape[0]):
            moved = False
            for r in range(first, last):
                q = values[k, j, r]
                if q * (gradient[j, r] + q * near[j, j]) < 0:
                    turned[k, j, r] = not turned[k, j, r]
                    values[k, j, r] = -q
                    step[r - first] = 2 * q
                    change[j, r] += 2 * q
                    moved = True
                else:
                    step[r - first] = 0
            if moved:
                for column in range(width):
                    factor = near[j, column]
                    for r in range(first, last):
                        gradient[column, r] += factor * step[r - first]
