"""Launches the serving kernels for one linear: decode for few rows of a variant, prefill for many.

Nothing here depends on the length of a prompt: kernels are compiled for a weight's shape, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch.nn import functional

from peraxis_format.torch import kernels
from peraxis_format.torch.rows import Rows

if TYPE_CHECKING:
    from peraxis_format.torch.linear import ServedLinear
    from peraxis_format.torch.served import Patch, State

__all__ = ["LinearKernels"]

_DECODE_ROWS: Final = 16  # of a tile: the least that tensor cores multiply
_PREFILL_ROWS: Final = 64
_KINDS: Final = {torch.bfloat16: kernels.BF16, torch.float16: kernels.F16, torch.float32: kernels.F32}
_BITS: Final = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}


@dataclass(frozen=True, slots=True, eq=False)
class _Range:
    """Rows [begin, end) of the weight: heads and terms of kernels.py, over all variants."""

    begin: int
    end: int
    heads: Tensor
    terms: Tensor
    most: int


class LinearKernels:
    """The tables of one linear, made when first needed."""

    def __init__(self) -> None:
        self._ranges: list[_Range] | None = None
        self._bias_table: Tensor | None = None

    @torch.no_grad()
    def linear(self, module: ServedLinear, state: State, x: Tensor, lead: Sequence[int], rows: Rows) -> Tensor:
        """x: [rows, in_features]. Returns [rows, out_features]."""
        from peraxis_format.torch.linear import MANY_ROWS

        x = x.contiguous()
        groups = rows.groups(lead, x.device)
        patches = state.patches.get("weight", {})
        exact = [v for v in groups if any(patch.full is not None for patch in patches.get(v, []))]
        many = [v for v, index in groups.items() if len(index) >= MANY_ROWS and v not in exact]
        few = [v for v in groups if v in patches and v not in many and v not in exact]
        biases = self._biases(module, state)
        bias = module.bias if biases is None else None
        if len(many) < len(groups):
            out = functional.linear(x, module.weight, bias)
        else:
            out = torch.empty(len(x), module.out_features, dtype=x.dtype, device=x.device)
        for part in self._tables(module, state):
            if many:
                self._prefill(part, module, bias, x, out, rows, lead, many)
            if few:
                self._decode(part, x, out, rows, lead, few)
        for variant in exact:
            index = groups[variant]
            out[index] = functional.linear(x[index], state.parameter(module, "weight", variant), bias)
        if biases is not None:
            out += biases[rows.index(lead, x.device)]
        return out

    def _biases(self, module: ServedLinear, state: State) -> Tensor | None:
        """[variants + 1, out_features], the base's last, where it answers to -1; None where all share the base's."""
        changed = state.patches.get("bias")
        if not changed:
            return None
        if self._bias_table is None:
            count = max(max(of, default=-1) for of in state.patches.values()) + 1
            table = [state.parameter(module, "bias", v).detach() for v in range(count)]
            self._bias_table = torch.stack([*table, module.bias.detach()])
        return self._bias_table

    def _decode(
        self, part: _Range, x: Tensor, out: Tensor, rows: Rows, lead: Sequence[int], variants: Sequence[int]
    ) -> None:
        tiles = rows.tiles(lead, variants, _DECODE_ROWS, x.device)
        width, height = 64, part.end - part.begin
        bits = _BITS[x.dtype]
        kernels.decode_kernel[(-(-height // width), len(tiles.tiles))](
            out[:, part.begin :].view(bits), out.stride(0), x.view(bits), tiles.order, tiles.tiles, part.heads,
            part.terms, height, K=x.shape[1], TERMS=part.most, KIND=_KINDS[x.dtype], BM=_DECODE_ROWS, BN=width, BK=64,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=4, num_stages=3,
        )  # fmt: skip

    def _prefill(
        self, part: _Range, module: ServedLinear, bias: Tensor | None, x: Tensor, out: Tensor, rows: Rows,
        lead: Sequence[int], variants: Sequence[int],
    ) -> None:  # fmt: skip
        tiles = rows.tiles(lead, variants, _PREFILL_ROWS, x.device)
        width, height = 128, part.end - part.begin
        bits = _BITS[x.dtype]
        added = x if bias is None else bias[part.begin :].detach()
        kernels.prefill_kernel[(-(-height // width), len(tiles.tiles))](
            out[:, part.begin :].view(bits), out.stride(0), x.view(bits),
            module.weight[part.begin :].detach().view(bits), added.view(bits), tiles.order, tiles.tiles, part.heads,
            part.terms, height, K=x.shape[1], TERMS=part.most, KIND=_KINDS[x.dtype],
            HAS_BIAS=bias is not None, BM=_PREFILL_ROWS, BN=width, BK=64,
            UPCAST=x.dtype == torch.float32 or not x.is_cuda, num_warps=8, num_stages=3,
        )  # fmt: skip

    def _tables(self, module: ServedLinear, state: State) -> list[_Range]:
        if self._ranges is None:
            patches = state.patches.get("weight", {})
            bounds = sorted({(p.begin, p.end) for of in patches.values() for p in of})
            self._ranges = [_range(begin, end, patches, module.weight.device) for begin, end in bounds]
            if not self._ranges:
                self._ranges = [_range(0, module.out_features, {}, module.weight.device)]
        return self._ranges


def _range(begin: int, end: int, patches: dict[int, list[Patch]], device: torch.device) -> _Range:
    heads: list[int] = [0]
    rows: list[list[int]] = []
    for variant in range(max(patches, default=-1) + 1):
        for patch in patches.get(variant, []):
            if (patch.begin, patch.end) == (begin, end):
                rows.extend([t.mask.data_ptr(), t.row.data_ptr(), t.col.data_ptr()] for t in patch.terms)
        heads.append(len(rows))
    counts = [b - a for a, b in pairwise(heads)]
    return _Range(
        begin,
        end,
        torch.tensor(heads, dtype=torch.int32, device=device),
        torch.tensor(rows or [[0, 0, 0]], dtype=torch.int64, device=device),
        max(counts, default=1) or 1,
    )
