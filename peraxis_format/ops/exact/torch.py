"""Exact updates of torch tensors: on the CPU through numba or numpy, on a CUDA device through triton.py."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peraxis_format.dtypes import DType
from peraxis_format.ops.exact import apply, refuse_block
from peraxis_format.ops.exact.kinds import BLOCK, kind_of
from peraxis_format.ops.tensors import storage_array

__all__ = ["decode_into", "moved"]

_SLACK: Final = 16  # bytes on both sides of the data, which the kernel may read
_BLOCKS: Final = 256  # blocks to decode at a time on a device: 32 MiB of BF16


def moved(
    weights: Tensor,
    index: NDArray[np.uint32],
    data: NDArray[np.uint8],
    dtype: DType,
    *,
    backend: Literal["cpu", "triton"] | None = None,
    field: str | None = None,
    first: int = 0,
) -> Tensor:
    """Apply an update to a contiguous tensor. Returns a new tensor of its shape on its device.

    index, data: the caller has called ops.exact.check on them. backend: by default triton on a CUDA device. field,
    first: see ops.exact.apply. Raises BindingError (E405) if the bits do not decode on these weights.
    """
    if backend == "triton" or (backend is None and weights.is_cuda):
        device = weights.device
        entries = torch.from_numpy(index.astype(np.int64)).to(device)
        new, sound = _decoded(
            weights, entries, (entries >> 8).cumsum(0), _words(torch.tensor(data, device=device)), dtype
        )
        unsound = (sound == 0).nonzero()
        if unsound.numel():
            refuse_block(first + int(unsound[0]), field)
        return new
    new = weights.detach().cpu().clone()
    apply(storage_array(new), index, data, dtype, threads=1, field=field, first=first)
    return new.to(weights.device)


def decode_into(out: Tensor, base: Tensor, index: Tensor, data: Tensor, dtype: DType) -> None:
    """Write the updated weights of `base` to `out` on out's device, without waiting for it.

    The caller has proved that the update decodes on this base, so it is not checked again. base: contiguous, on any
    device; it may be `out`. index: int32 [blocks], data: uint8 [size], both on out's device.
    """
    entries = index.to(torch.int64) & 0xFFFFFFFF
    ends, words = (entries >> 8).cumsum(0), _words(data)
    target = out.detach() if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    flat, source = target.reshape(-1), base.detach().reshape(-1)
    for first in range(0, len(entries), _BLOCKS):
        some, blocks = slice(first * BLOCK, (first + _BLOCKS) * BLOCK), slice(first, first + _BLOCKS)
        old = source[some].to(out.device, non_blocking=True)
        flat[some].copy_(_decoded(old, entries[blocks], ends[blocks], words, dtype)[0])
    if target.data_ptr() != out.data_ptr():
        out.copy_(target)


def _words(data: Tensor) -> Tensor:
    """Bytes as int32 words, with slack on both sides."""
    padded = torch.zeros(-(-(len(data) + 2 * _SLACK) // 4) * 4, dtype=torch.uint8, device=data.device)
    padded[_SLACK : _SLACK + len(data)] = data
    return padded.view(torch.int32)


def _decoded(weights: Tensor, entries: Tensor, ends: Tensor, words: Tensor, dtype: DType) -> tuple[Tensor, Tensor]:
    """The updated weights, and int32 [blocks]: 1 where a block is well-formed.

    entries: int64 [blocks], of the index. ends: the places in `words`, after the slack, where the blocks' bytes end.
    """
    from peraxis_format.ops.exact.triton import TILE, count_kernel, exact_kernel

    kind, device = kind_of(dtype), weights.device
    old = weights.detach().reshape(-1).view(torch.int16 if kind.width == 16 else torch.int32)
    new = old.clone()
    sound = torch.zeros(len(entries), dtype=torch.int32, device=device)
    counts = torch.empty(len(entries), BLOCK // TILE, 16, dtype=torch.int32, device=device)
    shapes = {"MANTISSA": kind.mantissa, "MASK": kind.mask, "WIDTH": kind.width, "SIZE": BLOCK, "N": TILE}
    tiles = -(-min(old.numel(), BLOCK) // TILE)
    count_kernel[(len(entries), tiles)](old, entries, counts, old.numel(), **shapes, num_warps=4)
    exact_kernel[(len(entries),)](old, new, entries, ends, words, counts, sound, old.numel(), **shapes, num_warps=1)
    return new.view(weights.dtype).reshape(weights.shape), sound
