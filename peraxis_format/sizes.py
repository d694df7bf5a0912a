"""Sizes in the data of a file, shared by reader, writer, plan and budget (SPEC 4.2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from peraxis_format.dtypes import DType

__all__ = ["ALIGNMENT", "aligned", "payload_size"]

ALIGNMENT: Final = 64


def aligned(size: int) -> int:
    """Round up to a multiple of 64 bytes, where the next tensor or part begins."""
    return size + -size % ALIGNMENT


def payload_size(parts: Iterable[tuple[str, DType, tuple[int, ...]]]) -> int:
    """The bytes of parts (see `tensor_shapes`) in a file; each part and the end are aligned."""
    return sum(aligned(dtype.size_of(shape)) for _, dtype, shape in parts)
