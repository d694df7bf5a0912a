"""Launches the serving kernels for one linear: a single row, few rows of a variant, or many (signed_matmul/triton.py).

Nothing here depends on the length of a prompt: kernels are compiled for a weight's shape, once. The tables of a linear
are made when it is first needed, those of a batch when it is first seen (rows.py), so that the same batch can be
captured in a CUDA graph after one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from peraxis_format.ops.rebuild import triton as kernels
from peraxis_format.ops.signed_matmul import triton as serving
from peraxis_format.torch.serve.linear import MANY_ROWS
from peraxis_format.torch.serve.rows import Batch, Tiles

if TYPE_CHECKING:
    from peraxis_format.torch.serve.modules import Patch, State

__all__ = ["LinearKernels", "split_of"]

_DECODE_ROWS: Final = (16, 64)  # of a tile: the least that tensor cores multiply, and what serves for more
_PREFILL_ROWS: Final = (64, 128)
_SPLIT_COLUMNS: Final = 512  # at least, for one program
_SPLIT_MOST: Final = 8
_KINDS: Final = {torch.bfloat16: kernels.BF16, torch.float16: kernels.F16, torch.float32: kernels.F32}
_BITS: Final = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}


def split_of(width: int, programs: int, processors: int) -> int:
    """Into how many parts decode cuts the columns: a power of two, so that all processors have two programs to run."""
    split = 1
    while split < _SPLIT_MOST and programs * split < 2 * processors and width >= 2 * split * _SPLIT_COLUMNS:
        split *= 2
    return split


@dataclass(frozen=True, slots=True, eq=False)
class _Range:
    """Rows [begin, end) of the weight. terms: of signed_matmul/triton.py, over all variants, `most` each.

    plain: none has a col.
    """

    begin: int
    end: int
    terms: Tensor
    most: int
    plain: bool


class LinearKernels:
    """The tables of one linear, and its launches: a `Products`."""

    def __init__(self) -> None:
        self._ranges: list[_Range] | None = None

    def many(self, module: nn.Linear) -> int:
        return MANY_ROWS

    def single(self, module: nn.Linear, state: State, x: Tensor, variant: int) -> Tensor | None:
        """A batch of one row: base and terms in one pass. None where this does not do (parts of a fused weight)."""
        ranges = self._tables(module, state)
        if len(ranges) != 1 or ranges[0].end - ranges[0].begin != module.out_features:
            return None
        out = torch.empty(1, module.out_features, dtype=x.dtype, device=x.device)
        own = variant in state.patches.get("bias", {})
        bias = state.parameter(module, "bias", variant).detach() if own else module.bias
        bits, weight = _BITS[x.dtype], module.weight.detach()
        added = x if bias is None else bias.detach()
        serving.single_kernel[(-(-module.out_features // 8),)](
            out.view(bits), x.contiguous().view(bits), weight.view(bits), added.view(bits), variant, ranges[0].terms,
            module.out_features, K=x.shape[1], TERMS=ranges[0].most, KIND=_KINDS[x.dtype], HAS_BIAS=bias is not None,
            BN=8, BG=128, num_warps=4,
        )  # fmt: skip
        return out

    def add_terms(
        self, module: nn.Linear, state: State, x: Tensor, batch: Batch, variants: Sequence[int], out: Tensor
    ) -> None:
        """Terms in binary32, rounded once onto `out`; then the biases, rounded again."""
        x = x.contiguous()
        mine = [v for v in variants if v in state.patches.get("weight", {})]
        for part in self._tables(module, state) if mine else ():
            self._decode(part, x, out, batch.tiles(mine, _DECODE_ROWS))
        for v in variants:
            if v in state.patches.get("bias", {}):
                out[batch.span([v])] += state.parameter(module, "bias", v).detach()

    def _decode(self, part: _Range, x: Tensor, out: Tensor, tiles: Tiles) -> None:
        exact = x.dtype == torch.float32
        width, groups = (64, 8) if exact else (128, 16)
        height, across = part.end - part.begin, -(-(part.end - part.begin) // width)
        split = split_of(x.shape[1], across * len(tiles.tiles), _processors(x.device))
        target, kind = out[:, part.begin :].view(_BITS[x.dtype]), _KINDS[x.dtype]
        count = len(tiles.order)
        partial = torch.empty(split * count * height if split > 1 else 1, dtype=torch.float32, device=x.device)
        serving.decode_kernel[(across, len(tiles.tiles), split)](
            target, out.stride(0), x.view(_BITS[x.dtype]), tiles.order, tiles.tiles, part.terms, partial, count,
            height, serving.SIGNS, serving.ONES, K=x.shape[1], TERMS=part.most, KIND=kind,
            PLAIN=part.plain and x.dtype == torch.bfloat16, BM=tiles.height, BN=width, BG=groups, SPLIT=split,
            UPCAST=not x.is_cuda, num_warps=4, num_stages=3,
        )  # fmt: skip
        if split > 1:
            serving.reduce_kernel[(-(-height // 256), count)](
                target, out.stride(0), partial, tiles.order, count, height, KIND=kind, SPLIT=split, BN=256,
            )  # fmt: skip

    def merged(
        self, module: nn.Linear, state: State, x: Tensor, batch: Batch, variants: Sequence[int], out: Tensor
    ) -> None:
        """All variants in one launch."""
        x = x.contiguous()
        tiles = batch.tiles(variants, _PREFILL_ROWS)
        bits, weight = _BITS[x.dtype], module.weight.detach()
        own = any(v in state.patches.get("bias", {}) for v in variants)
        bias = None if own or module.bias is None else module.bias.detach()
        for part in self._tables(module, state):
            height = part.end - part.begin
            serving.prefill_kernel[(-(-height // 128), len(tiles.tiles))](
                out[:, part.begin :].view(bits), out.stride(0), x.view(bits), weight[part.begin :].view(bits),
                (x if bias is None else bias[part.begin :]).view(bits), tiles.order, tiles.tiles, part.terms, height,
                K=x.shape[1], TERMS=part.most, KIND=_KINDS[x.dtype], HAS_BIAS=bias is not None, BM=tiles.height, BN=128,
                BG=8, UPCAST=x.dtype == torch.float32 or not x.is_cuda, num_warps=8, num_stages=3,
            )  # fmt: skip
        for v in variants if own else ():
            out[batch.span([v])] += state.parameter(module, "bias", v).detach()

    def _tables(self, module: nn.Linear, state: State) -> list[_Range]:
        """One for each stretch of rows that some variant changes, and for those between them."""
        if self._ranges is None:
            patches = state.patches.get("weight", {})
            changed = sorted({(p.begin, p.end) for of in patches.values() for p in of})
            bounds, at = [], 0
            for begin, end in changed:
                bounds += [(at, begin), (begin, end)] if begin > at else [(begin, end)]
                at = end
            if at < module.out_features:
                bounds.append((at, module.out_features))
            self._ranges = [_range(begin, end, patches, module.weight.device) for begin, end in bounds]
        return self._ranges


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _range(begin: int, end: int, patches: dict[int, list[Patch]], device: torch.device) -> _Range:
    found = {
        variant: [t for patch in of if (patch.begin, patch.end) == (begin, end) for t in patch.terms]
        for variant, of in patches.items()
    }
    most = max((len(terms) for terms in found.values()), default=0) or 1
    table = torch.zeros(max(patches, default=0) + 1, most, 3, dtype=torch.int64)
    for variant, terms in found.items():
        for k, t in enumerate(terms):
            table[variant, k] = torch.tensor([t.mask.data_ptr(), t.row.data_ptr(), 0 if t.plain else t.col.data_ptr()])
    plain = all(t.plain for terms in found.values() for t in terms)
    return _Range(begin, end, table.to(device), most, plain)
