"""Data types of tensors, and the exact conversions between binary32 and the float types.

    BF16 -> F32   bits << 16
    F32 -> BF16   (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16        nearest, ties to even; integers only
    F16 <-> F32   IEEE conversions of numpy (nearest-even, subnormals kept)

numpy has no bfloat16, so a BF16 tensor is represented by its bit patterns in uint16. The array with a tensor's bytes is
called its storage array for every dtype. F8 tensors are represented as uint8. F4 and F6 tensors
pack their elements, so their storage array is flat, uint8 [bytes].
"""

from __future__ import annotations

import hashlib
import math
from enum import Enum
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from peraxis_format.errors import ShapeError

__all__ = ["Array", "DType", "digest_of", "from_float32", "raw_bytes", "to_float32"]

Array: TypeAlias = NDArray[Any]

_STORAGE: Final[dict[str, type[np.generic]]] = {
    "F4": np.uint8,
    "F6_E2M3": np.uint8,
    "F6_E3M2": np.uint8,
    "BOOL": np.uint8,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E4M3": np.uint8,
    "F8_E4M3FNUZ": np.uint8,
    "F8_E5M2": np.uint8,
    "F8_E5M2FNUZ": np.uint8,
    "F8_E8M0": np.uint8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": np.uint16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
    "C64": np.complex64,
}
# The types whose elements take less than a byte, with their bits.
_BITS: Final = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

_LITTLE: Final[dict[str, np.dtype[Any]]] = {name: np.dtype(kind).newbyteorder("<") for name, kind in _STORAGE.items()}


class DType(Enum):
    """The dtypes of SPEC 1, by their safetensors names."""

    F4 = "F4"
    F6_E2M3 = "F6_E2M3"
    F6_E3M2 = "F6_E3M2"
    BOOL = "BOOL"
    U8 = "U8"
    I8 = "I8"
    F8_E4M3 = "F8_E4M3"
    F8_E4M3FNUZ = "F8_E4M3FNUZ"
    F8_E5M2 = "F8_E5M2"
    F8_E5M2FNUZ = "F8_E5M2FNUZ"
    F8_E8M0 = "F8_E8M0"
    U16 = "U16"
    I16 = "I16"
    F16 = "F16"
    BF16 = "BF16"
    U32 = "U32"
    I32 = "I32"
    F32 = "F32"
    U64 = "U64"
    I64 = "I64"
    F64 = "F64"
    C64 = "C64"

    @property
    def storage(self) -> np.dtype[Any]:
        """The numpy dtype of the storage array, little-endian."""
        return _LITTLE[self.value]

    @property
    def itemsize(self) -> int:
        """The bytes of one element of the storage array; `bits` is the size of an element."""
        return self.storage.itemsize

    @property
    def bits(self) -> int:
        """The bits of one element: 4, 6, or those of the storage type."""
        return _BITS.get(self.value, 8 * self.itemsize)

    @property
    def is_packed(self) -> bool:
        """Whether elements take less than a byte, so that the storage array does not have the tensor's shape."""
        return self.value in _BITS

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape has a whole number of bytes (SPEC 2.14)."""
        return not self.is_packed or math.prod(shape) * self.bits % 8 == 0

    def size_of(self, shape: tuple[int, ...]) -> int:
        """The bytes of a tensor of this shape; rounded up if the shape does not fit."""
        return -(-math.prod(shape) * self.bits // 8)

    def storage_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the storage array of a tensor of this shape: the same, or [bytes] for a packed type."""
        return (self.size_of(shape),) if self.is_packed else shape

    def first_rows(self, array: Array, shape: tuple[int, ...], rows: int) -> Array:
        """The first rows of a tensor of this shape, as a view of its storage array; all of a tensor without dimensions.

        For a packed type they must be whole bytes, which SPEC 3.10 ensures for rows that a base of the same type has
        too.
        """
        if not shape:
            return array
        return array[: self.size_of((rows, *shape[1:]))] if self.is_packed else array[:rows]

    def rows_from(self, array: Array, shape: tuple[int, ...], rows: int) -> Array:
        """The elements after the first rows, as a view."""
        return array[self.size_of((rows, *shape[1:])) :] if self.is_packed else array[rows:]

    @property
    def is_float(self) -> bool:
        """Whether this is one of the float types of SPEC 1, on which deltas are defined."""
        return self in (DType.BF16, DType.F16, DType.F32)


def raw_bytes(array: Array) -> memoryview:
    """The bytes of a storage array in row-major order, without a copy if it is contiguous."""
    flat: Any = np.ascontiguousarray(array).reshape(-1)
    return memoryview(flat.view(np.uint8))


def digest_of(array: Array) -> str:
    """The SHA-256 of a storage array's bytes, as 64 hex digits."""
    return hashlib.sha256(raw_bytes(array)).hexdigest()


def to_float32(array: Array, dtype: DType) -> NDArray[np.float32]:
    """Convert a storage array of a float type to binary32, exactly.

    Returns a new array, but for F32 the same array. Raises ShapeError for another dtype.
    """
    if dtype is DType.F32:
        return array.astype(np.float32, copy=False)
    if dtype is DType.F16:
        return array.astype(np.float32)
    if dtype is DType.BF16:
        bits = array.astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
    raise ShapeError(f"{dtype.value} is not one of BF16, F16, F32")


def from_float32(array: NDArray[np.float32], dtype: DType) -> Array:
    """Round binary32 to a float type, to nearest, ties to even (SPEC 6.1); NaN becomes canonical (SPEC 6.2).

    Returns a storage array of the same shape. Magnitudes beyond the type become infinity.
    Raises ShapeError for a dtype that is not BF16, F16 or F32.
    """
    nan = np.isnan(array)
    if dtype is DType.F32:
        rounded: Array = array.copy()
        quiet: Any = np.float32(np.nan)
    elif dtype is DType.F16:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            rounded = array.astype(np.float16)
        quiet = np.float16(np.nan)
    elif dtype is DType.BF16:
        bits = np.ascontiguousarray(array).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        odd += np.uint32(0x7FFF)
        odd += bits
        odd >>= np.uint32(16)
        rounded = odd.astype(np.uint16)
        quiet = np.uint16(0x7FC0)
    else:
        raise ShapeError(f"{dtype.value} is not one of BF16, F16, F32")
    if nan.any():
        # SPEC 6.2: 0x7FC0, 0x7E00, 0x7FC00000, for every payload.
        rounded[nan] = quiet
    return rounded
