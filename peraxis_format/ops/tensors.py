"""torch tensors <-> storage arrays (peraxis_format.dtypes), without a copy.

torch has no tensors of packed types (F4, F6), so live models have none.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from peraxis_format.dtypes import Array, DType
from peraxis_format.errors import LiveModelError

__all__ = ["TORCH_DTYPES", "as_bytes", "dtype_of", "from_storage", "storage_array", "tensor_view", "torch_dtype"]

TORCH_DTYPES: Final[dict[DType, torch.dtype]] = {
    DType.BOOL: torch.bool,
    DType.U8: torch.uint8,
    DType.I8: torch.int8,
    DType.F8_E4M3: torch.float8_e4m3fn,
    DType.F8_E4M3FNUZ: torch.float8_e4m3fnuz,
    DType.F8_E5M2: torch.float8_e5m2,
    DType.F8_E5M2FNUZ: torch.float8_e5m2fnuz,
    DType.U16: torch.uint16,
    DType.I16: torch.int16,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.U32: torch.uint32,
    DType.I32: torch.int32,
    DType.F32: torch.float32,
    DType.U64: torch.uint64,
    DType.I64: torch.int64,
    DType.F64: torch.float64,
    DType.C64: torch.complex64,
}
_DTYPES: Final = {value: key for key, value in TORCH_DTYPES.items()}
# numpy has none of these, so they are unsigned integers, as in a storage array.
_CARRIED: Final = {
    torch.bool: torch.uint8,
    torch.bfloat16: torch.uint16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e4m3fnuz: torch.uint8,
    torch.float8_e5m2: torch.uint8,
    torch.float8_e5m2fnuz: torch.uint8,
}


# torch 2.7 and later.
if hasattr(torch, "float8_e8m0fnu"):
    TORCH_DTYPES[DType.F8_E8M0] = torch.float8_e8m0fnu
    _DTYPES[torch.float8_e8m0fnu] = DType.F8_E8M0
    _CARRIED[torch.float8_e8m0fnu] = torch.uint8


def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's dtype. Raises LiveModelError if torch has no tensors of this type."""
    if dtype not in TORCH_DTYPES:
        raise LiveModelError(f"torch has no {dtype.value} tensors; write the checkpoint with `peraxis-tools apply`")
    return TORCH_DTYPES[dtype]


def dtype_of(tensor: Tensor, name: str) -> DType:
    """The dtype of SPEC 1. Raises LiveModelError for one that PXD does not have (for example a quantised tensor)."""
    if tensor.dtype not in _DTYPES:
        raise LiveModelError(f"{name}: dtype {tensor.dtype} is not one of a checkpoint; load the model unquantised")
    return _DTYPES[tensor.dtype]


def storage_array(tensor: Tensor) -> Array:
    """The storage array of a CPU tensor, sharing memory, with its strides."""
    plain = tensor.detach()
    array: Array = plain.view(_CARRIED.get(plain.dtype, plain.dtype)).numpy()
    return array


def from_storage(array: Array, dtype: DType) -> Tensor:
    """A storage array as a tensor of its dtype, sharing memory. Raises LiveModelError as torch_dtype does."""
    return torch.from_numpy(array).view(torch_dtype(dtype))


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes in row-major order as a flat uint8 tensor on its device; a copy only if it is strided."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def tensor_view(buffer: Tensor, offset: int, dtype: DType, shape: tuple[int, ...]) -> Tensor:
    """A tensor inside a flat uint8 buffer. offset: bytes, a multiple of the dtype's size."""
    return buffer[offset : offset + dtype.size_of(shape)].view(torch_dtype(dtype)).view(shape)
