"""Properties of a dtype for the codecs of exact updates, and the sizes of a block (SPEC 5.6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from peraxis_format.dtypes import DType
from peraxis_format.errors import ShapeError

__all__ = ["BLOCK", "KINDS", "RAW", "FloatKind", "block_bytes", "blocks_of", "kind_of"]

BLOCK: Final = 65_536  # weights
RAW: Final = 255  # the mode of a block that consists of its new patterns


@dataclass(frozen=True, slots=True)
class FloatKind:
    """width: bits of a pattern. mantissa: bits below its exponent. mask: of the exponent, shifted down."""

    width: int
    mantissa: int
    mask: int


KINDS: Final = {DType.BF16: FloatKind(16, 7, 255), DType.F16: FloatKind(16, 10, 31), DType.F32: FloatKind(32, 23, 255)}


def kind_of(dtype: DType) -> FloatKind:
    """The kind of a dtype. Raises ShapeError if it is not BF16, F16 or F32."""
    if dtype not in KINDS:
        raise ShapeError(f"{dtype.value} is not one of BF16, F16, F32")
    return KINDS[dtype]


def blocks_of(weights: int) -> int:
    """The number of blocks of a tensor with this many weights."""
    return -(-weights // BLOCK)


def block_bytes(weights: int, block: int, kind: FloatKind) -> int:
    """The bytes of the new patterns of block `block` in a tensor with this many weights."""
    return min(BLOCK, weights - block * BLOCK) * kind.width // 8
