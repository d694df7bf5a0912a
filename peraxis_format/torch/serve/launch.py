"""The kernels' `Products` of one linear: a single row, few rows of a variant, or many (ops/signed_matmul/launch.py).

The tables of a linear are made on its first use, those of a batch on its first run (rows.py), so the same batch can be
captured in a CUDA graph after one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from torch import Tensor, nn
from torch.nn import functional

from peraxis_format.ops.signed_matmul import launch
from peraxis_format.ops.signed_matmul.launch import DECODE_ROWS, PREFILL_ROWS, FactorTable
from peraxis_format.torch.serve.linear import MANY_ROWS, row_ranges
from peraxis_format.torch.serve.rows import Batch

if TYPE_CHECKING:
    from peraxis_format.torch.serve.modules import State

__all__ = ["LinearKernels"]

_DENSE: Final = 1 << 26  # weights of a dense product: 128 MiB of BF16, a matrix of an 8B model


class LinearKernels:
    """The tables of one linear, and its launches: a `Products`."""

    def __init__(self) -> None:
        self._ranges: list[FactorTable] | None = None

    def many(self, module: nn.Linear) -> int:
        return MANY_ROWS

    def single(self, module: nn.Linear, state: State, x: Tensor, variant: int) -> Tensor | None:
        """A batch of one row: base and components in one pass. None for slices of a fused weight."""
        ranges = self._tables(module, state)
        if len(ranges) != 1 or ranges[0].end - ranges[0].begin != module.out_features:
            return None
        own = variant in state.patches.get("bias", {})
        bias = state.parameter(module, "bias", variant).detach() if own else module.bias
        return launch.single(x, module.weight.detach(), bias, ranges[0], variant)

    def add_components(
        self, module: nn.Linear, state: State, x: Tensor, batch: Batch, variants: Sequence[int], out: Tensor
    ) -> None:
        """Add components in binary32, rounded once onto `out`; then the biases, rounded again."""
        x = x.contiguous()
        mine = [v for v in variants if v in state.patches.get("weight", {})]
        for table in self._tables(module, state) if mine else ():
            launch.decode(x, table, batch.tiles(mine, DECODE_ROWS), out)
        for v in variants:
            if v in state.patches.get("bias", {}):
                out[batch.span([v])] += state.parameter(module, "bias", v).detach()

    def merged(
        self, module: nn.Linear, state: State, x: Tensor, batch: Batch, variants: Sequence[int], out: Tensor
    ) -> None:
        """Variants with one tile of rows in one launch; others one by one, with their weights as a matrix."""
        x = x.contiguous()
        own = any(v in state.patches.get("bias", {}) for v in variants)
        bias = None if own or module.bias is None else module.bias.detach()
        weight = module.weight.detach()
        many = [v for v in variants if len(batch.groups[v]) > PREFILL_ROWS[-1]]
        few = [v for v in variants if v not in many]
        for table in self._tables(module, state):
            if few:
                launch.prefill(x, weight, bias, table, batch.tiles(few, PREFILL_ROWS), out)
            for v in many:
                _dense(x, weight, bias, table, v, batch.span([v]), out)
        for v in variants if own else ():
            out[batch.span([v])] += state.parameter(module, "bias", v).detach()

    def _tables(self, module: nn.Linear, state: State) -> list[FactorTable]:
        """One table for each range of rows that some variant changes, and for the ranges between them."""
        if self._ranges is None:
            patches = state.patches.get("weight", {})
            changed = {(p.begin, p.end) for of in patches.values() for p in of}
            self._ranges = []
            for begin, end in row_ranges(changed, module.out_features):
                found = {
                    variant: [t for patch in of if (patch.begin, patch.end) == (begin, end) for t in patch.factors]
                    for variant, of in patches.items()
                }
                self._ranges.append(FactorTable.of(begin, end, found, module.weight.device))
        return self._ranges


def _dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: FactorTable, variant: int, span: slice | Tensor, out: Tensor
) -> None:
    """out[span] = x[span] W_v^T + bias for the table's rows, at most _DENSE weights at a time."""
    step = max(1, _DENSE // weight.shape[1])
    for begin in range(0, table.end - table.begin, step):
        rows = slice(begin, min(begin + step, table.end - table.begin))
        columns = slice(table.begin + rows.start, table.begin + rows.stop)
        merged = launch.merge(weight, table, variant, rows)
        out[span, columns] = functional.linear(x[span], merged, None if bias is None else bias[columns])
