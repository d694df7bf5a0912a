"""Exact updates of torch tensors: on the CPU through numba or numpy, on a CUDA device through triton.py."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peraxis_format.dtypes import DType
from peraxis_format.errors import fail
from peraxis_format.ops.exact import apply
from peraxis_format.ops.exact.kinds import BLOCK, kind_of
from peraxis_format.ops.tensors import storage_array

__all__ = ["moved"]

_SLACK = 16  # bytes on both sides of the data, which the kernel may read


def moved(
    weights: Tensor,
    index: NDArray[np.uint32],
    data: NDArray[np.uint8],
    dtype: DType,
    *,
    backend: Literal["cpu", "triton"] | None = None,
) -> Tensor:
    """Apply an update to a contiguous tensor. Returns a new tensor of its shape on its device.

    index, data: the caller has called ops.exact.check on them. backend: by default triton on a CUDA device. Raises
    BindingError (E405) if the bits do not decode on these weights.
    """
    if backend == "triton" or (backend is None and weights.is_cuda):
        return _on_device(weights, index, data, dtype)
    new = weights.detach().cpu().clone()
    apply(storage_array(new), index, data, dtype, threads=1)
    return new.to(weights.device)


def _on_device(weights: Tensor, index: NDArray[np.uint32], data: NDArray[np.uint8], dtype: DType) -> Tensor:
    from peraxis_format.ops.exact.triton import TILE, count_kernel, exact_kernel

    kind, device = kind_of(dtype), weights.device
    patterns = torch.int16 if kind.width == 16 else torch.int32
    old = weights.detach().reshape(-1).view(patterns)
    new = old.clone()
    padded = np.zeros(-(-(data.size + 2 * _SLACK) // 4) * 4, np.uint8)
    padded[_SLACK : _SLACK + data.size] = data
    words = torch.from_numpy(padded.view(np.int32)).to(device)
    entries = torch.from_numpy(index.astype(np.int64)).to(device)
    sound = torch.zeros(index.size, dtype=torch.int32, device=device)
    counts = torch.empty(index.size, BLOCK // TILE, 16, dtype=torch.int32, device=device)
    shapes = {"MANTISSA": kind.mantissa, "MASK": kind.mask, "WIDTH": kind.width, "SIZE": BLOCK, "N": TILE}
    tiles = -(-min(old.numel(), BLOCK) // TILE)
    count_kernel[(index.size, tiles)](old, entries, counts, old.numel(), **shapes, num_warps=4)
    ends = (entries >> 8).cumsum(0)
    exact_kernel[(index.size,)](old, new, entries, ends, words, counts, sound, old.numel(), **shapes, num_warps=1)
    unsound = (sound == 0).nonzero()
    if unsound.numel():
        fail("E405", f"block {int(unsound[0])} does not decode on these weights")  # SPEC 7.4
    return new.view(weights.dtype).reshape(weights.shape)
