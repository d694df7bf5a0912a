"""Bytes in the data of a file: one count for reader, writer, plan and budget (SPEC 4.2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from peraxis_format.dtypes import DType

__all__ = ["ALIGNMENT", "aligned", "payload_size"]

ALIGNMENT: Final = 64


def aligned(size: int) -> int:
    """The next multiple of 64 bytes, where the next tensor or part begins."""
    return size + -size % ALIGNMENT


def payload_size(parts: Iterable[tuple[str, DType, tuple[int, ...]]]) -> int:
    """Bytes that parts (as `tensor_shapes` lists them) take in a file: each one and the end aligned."""
    return sum(aligned(dtype.size_of(shape)) for _, dtype, shape in parts)
