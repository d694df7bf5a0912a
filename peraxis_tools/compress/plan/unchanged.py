"""Detect fine-tuned tensors that equal the base's, or the base's in another dtype: `same` (SPEC 6.3) is exact for them.

A difference is usually found in the first block, so the check of a changed tensor is cheap.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from peraxis_format import Array, DType, from_float32, raw_bytes, to_float32

__all__ = ["is_unchanged", "shared_rows"]

_BLOCK: Final = 1 << 18  # elements of one block


def shared_rows(shape: tuple[int, ...], base_shape: tuple[int, ...]) -> int | None:
    """The rows of the first dimension that both have (1 for no dimensions); None if others differ (SPEC 3.10).

    Law: shared_rows(s, s) covers all of s.
    """
    if len(shape) != len(base_shape) or shape[1:] != base_shape[1:]:
        return None
    return min(shape[0], base_shape[0]) if shape else 1


def is_unchanged(base: Array, fine_tuned: Array, *, base_dtype: DType, dtype: DType) -> bool:
    """Whether `same` rebuilds these rows bit for bit: equal bytes, or the base rounded once to the dtype (SPEC 6.3).

    base, fine_tuned: storage arrays of the rows that both have, of one shape.
    """
    if base.shape != fine_tuned.shape:
        return False
    if dtype is base_dtype:
        return _equal_bytes(base, fine_tuned)
    if not (dtype.is_float and base_dtype.is_float):
        return False
    left, right = base.reshape(-1), fine_tuned.reshape(-1)
    blocks = (slice(begin, begin + _BLOCK) for begin in range(0, left.size, _BLOCK))
    return all(_equal_bytes(from_float32(to_float32(left[b], base_dtype), dtype), right[b]) for b in blocks)


def _equal_bytes(left: Array, right: Array) -> bool:
    a, b = (np.frombuffer(raw_bytes(array), np.uint8) for array in (left, right))
    step = 4 * _BLOCK
    return all(np.array_equal(a[i : i + step], b[i : i + step]) for i in range(0, len(a), step))
