"""Launch the kernels of triton.py for one row, few or many rows of a variant, on rows [begin, end) of a weight.

Kernels are compiled once for a weight's shape; they do not depend on the length of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from peraxis_format.bits import mask_width
from peraxis_format.ops.rebuild.torch import ComponentTensors
from peraxis_format.ops.rebuild.triton import KINDS
from peraxis_format.ops.signed_matmul import triton as kernels
from peraxis_format.ops.signed_matmul.tiles import Tiles
from peraxis_format.ops.tensors import dtype_of

__all__ = [
    "DECODE_ROWS", "PREFILL_ROWS", "FactorTable", "decode", "merge", "prefill", "signed_matmul", "single", "split_of",
]  # fmt: skip

DECODE_ROWS: Final = (16, 64)  # rows of a tile: the least that tensor cores multiply, and the size for more
PREFILL_ROWS: Final = (64, 128)
_SPLIT_COLUMNS: Final = 512  # at least, for one program
_SPLIT_MOST: Final = 8


@dataclass(frozen=True, slots=True, eq=False)
class FactorTable:
    """The addresses of the components of rows [begin, end) of a weight. terms: see triton.py; `most` for each variant.

    plain: no component has a col. aligned: all masks begin at multiples of 16.
    """

    begin: int
    end: int
    terms: Tensor
    most: int
    plain: bool
    aligned: bool

    @classmethod
    def of(
        cls, begin: int, end: int, found: Mapping[int, Sequence[ComponentTensors]], device: torch.device
    ) -> FactorTable:
        """The table of each variant's components."""
        most = max((len(components) for components in found.values()), default=0) or 1
        table = torch.zeros(max(found, default=0) + 1, most, 3, dtype=torch.int64)
        for variant, components in found.items():
            for k, c in enumerate(components):
                addresses = [c.mask.data_ptr(), c.row.data_ptr(), 0 if c.plain else c.col.data_ptr()]
                table[variant, k] = torch.tensor(addresses)
        every = [c for components in found.values() for c in components]
        plain, aligned = all(c.plain for c in every), all(c.mask.data_ptr() % 16 == 0 for c in every)
        return cls(begin, end, table.to(device), most, plain, aligned)


def split_of(width: int, programs: int, processors: int) -> int:
    """The number of parts that decode cuts the columns into: a power of two that gives most processors a program."""
    split = 1
    while split < _SPLIT_MOST and 4 * programs * split < 3 * processors and width >= 2 * split * _SPLIT_COLUMNS:
        split *= 2
    return split


def signed_matmul(x: Tensor, components: Sequence[ComponentTensors], out: Tensor) -> None:
    """out += x (sum of components)^T, out float32 [rows, d_out]; x is widened."""
    rows, height = len(x), DECODE_ROWS[-1]
    if not rows or not components:
        return
    tiles = [(0, first, min(height, rows - first)) for first in range(0, rows, height)]
    order = torch.arange(rows, dtype=torch.int32, device=x.device)
    table = FactorTable.of(0, out.shape[1], {0: components}, x.device)
    cut = torch.tensor(tiles, dtype=torch.int32, device=x.device)
    decode(x.float().contiguous(), table, Tiles(order, cut, height), out)


def single(x: Tensor, weight: Tensor, bias: Tensor | None, table: FactorTable, variant: int) -> Tensor:
    """x (W + components)^T + bias for one row, in one pass over base and masks: [1, d_out] in x's dtype."""
    out = torch.empty(1, len(weight), dtype=x.dtype, device=x.device)
    added = x if bias is None else bias.detach()
    kernels.single_kernel[(-(-len(weight) // 8),)](
        _bits(out), _bits(x.contiguous()), _bits(weight), _bits(added), variant, table.terms, len(weight),
        K=x.shape[1], TERMS=table.most, KIND=_kind(x), HAS_BIAS=bias is not None, BN=8, BG=128, num_warps=4,
    )  # fmt: skip
    return out


def decode(x: Tensor, table: FactorTable, tiles: Tiles, out: Tensor) -> None:
    """out += x (sum of components)^T for the rows of the tiles, in binary32, rounded once.

    x: contiguous [rows, d_in]. out: [rows, columns], in x's dtype; the table's columns are added to.
    """
    exact = x.dtype == torch.float32
    words = not exact and table.aligned and x.shape[1] % 128 == 0
    width, groups = (64, 8) if exact else (128, 32 if words else 16)
    height, across = table.end - table.begin, -(-(table.end - table.begin) // width)
    split = split_of(x.shape[1], across * len(tiles.tiles), _processors(x.device))
    target, kind = _bits(out[:, table.begin :]), _kind(x)
    count = len(tiles.order)
    partial = torch.empty(split * count * height if split > 1 else 1, dtype=torch.float32, device=x.device)
    kernels.decode_kernel[(across, len(tiles.tiles), split)](
        target, out.stride(0), _bits(_paired(x) if words else x), tiles.order, tiles.tiles, table.terms, partial, count,
        height, kernels.SIGNS, kernels.ONES, K=x.shape[1], TERMS=table.most, KIND=kind,
        PLAIN=table.plain and x.dtype == torch.bfloat16, BM=tiles.height, BN=width, BG=groups, SPLIT=split,
        UPCAST=not x.is_cuda, ALIGNED=words, num_warps=8 if words else 4, num_stages=3,
    )  # fmt: skip
    if split > 1:
        kernels.reduce_kernel[(-(-height // 256), count)](
            target, out.stride(0), partial, tiles.order, count, height, KIND=kind, SPLIT=split, BN=256,
        )  # fmt: skip


def _paired(x: Tensor) -> Tensor:
    """Reorder columns in pairs (triton.py): each 128 of them from [word, half, t] to [t, word, half]."""
    return x.view(len(x), -1, 4, 2, 16).permute(0, 1, 4, 2, 3).reshape(x.shape)


def prefill(x: Tensor, weight: Tensor, bias: Tensor | None, table: FactorTable, tiles: Tiles, out: Tensor) -> None:
    """out = x W_v^T + bias for the rows of the tiles and the table's rows of the weight, W_v rebuilt tile by tile."""
    height = table.end - table.begin
    added = x if bias is None else bias[table.begin :]
    kernels.prefill_kernel[(-(-height // 128), len(tiles.tiles))](
        _bits(out[:, table.begin :]), out.stride(0), _bits(x), _bits(weight[table.begin :]), _bits(added),
        tiles.order, tiles.tiles, table.terms, height, K=x.shape[1], TERMS=table.most, KIND=_kind(x),
        HAS_BIAS=bias is not None, BM=tiles.height, BN=128, BG=8, UPCAST=x.dtype == torch.float32 or not x.is_cuda,
        num_warps=8, num_stages=3,
    )  # fmt: skip


def merge(weight: Tensor, table: FactorTable, variant: int, rows: slice) -> Tensor:
    """The merged weights of a variant for some of the table's rows, counted from its first: [rows, d_in]."""
    part = weight[table.begin + rows.start : table.begin + rows.stop]
    out = torch.empty_like(part)
    width = part.shape[1]
    terms = table.terms if not rows.start else _shifted(table.terms, rows.start, width)
    kernels.merge_kernel[(-(-len(part) // 8), -(-width // 512))](
        _bits(out), _bits(part), terms, variant, len(part), K=width, TERMS=table.most, KIND=_kind(part), BN=8, BG=64,
        num_warps=4,
    )  # fmt: skip
    return out


def _shifted(terms: Tensor, rows: int, width: int) -> Tensor:
    """The components from a row on; addresses of 0 stay 0."""
    steps = torch.tensor([rows * mask_width(width), 4 * rows, 0], device=terms.device)
    return torch.where(terms != 0, terms + steps, terms)


def _kind(tensor: Tensor) -> int:
    return KINDS[dtype_of(tensor, "x")]


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as unsigned integers, sharing memory, for the kernels."""
    return tensor.view(torch.uint16 if tensor.element_size() == 2 else torch.uint32)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
