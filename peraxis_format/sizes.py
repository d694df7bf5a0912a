"""Bytes of a module in the data of a file: one count for reader, writer, plan and budget (SPEC 4.1, 4.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from peraxis_format.delta import Axis, Encoding, tensor_shapes
from peraxis_format.dtypes import DType

__all__ = ["ALIGNMENT", "aligned", "module_size", "parts_size", "tensor_bytes"]

ALIGNMENT: Final = 64


def aligned(size: int) -> int:
    """The next multiple of 64."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def tensor_bytes(shape: Iterable[int], dtype: DType) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def parts_size(parts: Iterable[tuple[str, DType, tuple[int, ...]]]) -> int:
    """Bytes of a `.delta` tensor of these parts (suffix, dtype, shape): each one and the end aligned (SPEC 4.2)."""
    return sum(aligned(tensor_bytes(shape, dtype)) for _, dtype, shape in parts)


def module_size(
    *,
    shape: tuple[int, ...],
    dtype: DType,
    encoding: Encoding,
    axes: tuple[Axis, ...] = (),
    base_shape: tuple[int, ...] | None,
) -> int:
    """Bytes that a module takes in the data, with the pad that follows a `full` one where another tensor does."""
    return parts_size(tensor_shapes(shape=shape, dtype=dtype, encoding=encoding, axes=axes, base_shape=base_shape))
