"""A linear that gives each row of a batch its own variant.

    few rows of a variant     y = x W^T + sum over k of row_k o ((x o col_k) B_k^T)      W read once for all of them
    many                      y = x W_v^T, W_v rebuilt a block at a time                 the merged weights' values

A `Products` (modules.py) computes both: kernels on CUDA (launch.py); here ops/signed_matmul and ops/rebuild, which
choose torch or numba.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from peraxis_format.ops.backend import choose
from peraxis_format.ops.rebuild import rebuild_tensor
from peraxis_format.ops.rebuild.torch import Scratch
from peraxis_format.ops.signed_matmul import signed_matmul
from peraxis_format.torch.serve.modules import Patch, ServedModule, State
from peraxis_format.torch.serve.rows import Batch

__all__ = ["MANY_ROWS", "ServedLinear", "TorchProducts", "many_rows", "row_ranges"]

MANY_ROWS: Final = 64  # from this many rows of one variant on, its weights are rebuilt
_MANY_ROWS_NUMBA: Final = 32  # with numba a product costs as much as rebuilding from this many rows on
_BLOCK: Final = 1 << 23  # weights to rebuild at a time, so that they are in the cache when they are multiplied


def many_rows(weight: Tensor, backend: str | None = None) -> int:
    """The number of rows of one variant from which on its weight is rebuilt. backend: that of rebuild_tensor."""
    return _MANY_ROWS_NUMBA if _chosen(weight, backend) == "numba" else MANY_ROWS


def _chosen(weight: Tensor, backend: str | None) -> str:
    return choose("rebuild_tensor", weight.numel(), weight.device.type, backend)


class ServedLinear(ServedModule, nn.Linear):
    """A linear layer that computes each row with its own variant."""

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., in_features]. Returns [..., out_features], in the input's dtype."""
        with self.peraxis.own():
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        state, rows = self.peraxis, self.peraxis.rows()
        if rows is None or not any(state.changed(v) for v in rows.variants):
            return functional.linear(input, self.weight, self.bias)
        lead = input.shape[:-1]
        x = input.reshape(-1, input.shape[-1])
        return self._each(state, x, rows.batch(lead, x.device)).reshape(*lead, self.out_features)

    def _each(self, state: State, x: Tensor, batch: Batch) -> Tensor:
        """The products of all rows."""
        products = state.products
        weights, biases = state.patches.get("weight", {}), state.patches.get("bias", {})
        many = products.many(self)
        exact = [v for v in batch.groups if any(patch.full is not None for patch in weights.get(v, ()))]
        rebuilt = [v for v, rows in batch.groups.items() if v in weights and v not in exact and len(rows) >= many]
        others = [v for v in batch.groups if v not in exact and v not in rebuilt]
        few = [v for v in others if v in weights or v in biases]
        if len(x) == 1 and few and few[0] in weights:
            found = products.single(self, state, x, few[0])
            if found is not None:
                return found
        out = x.new_empty(len(x), self.out_features)
        # Variants with their own bias get it with their components, so their base product has no bias.
        self._base(x, batch, [v for v in others if v not in biases], self.bias, out)
        self._base(x, batch, [v for v in others if v in biases], None, out)
        if few:
            products.add_components(self, state, x, batch, few, out)
        if rebuilt:
            products.merged(self, state, x, batch, rebuilt, out)
        if exact:
            TorchProducts().merged(self, state, x, batch, exact, out)
        return out

    def _base(self, x: Tensor, batch: Batch, variants: Sequence[int], bias: Tensor | None, out: Tensor) -> None:
        if variants:
            span = batch.span(variants)
            out[span] = functional.linear(x[span], self.weight, bias)


class TorchProducts:
    """Products by operations on tensors, on any device. backend: torch or numba; None chooses for each weight."""

    def __init__(self, backend: str | None = None) -> None:
        self._backend = backend

    def many(self, module: nn.Linear) -> int:
        return many_rows(module.weight, self._backend)

    def single(self, module: nn.Linear, state: State, x: Tensor, variant: int) -> Tensor | None:
        return None

    def add_components(
        self, module: nn.Linear, state: State, x: Tensor, batch: Batch, variants: Sequence[int], out: Tensor
    ) -> None:
        """Add components in binary32, rounded once."""
        weights, biases = state.patches.get("weight", {}), state.patches.get("bias", {})
        span = batch.span(variants)
        inputs = x[span]
        total = torch.zeros(len(inputs), module.out_features, device=x.device)
        products, first = [], 0
        for v in variants:
            mine = slice(first, first + len(batch.groups[v]))
            if v in biases:
                total[mine] += state.parameter(module, "bias", v).detach().float()
            products += [(inputs[mine], p.factors, total[mine, p.begin : p.end]) for p in weights.get(v, ())]
            first = mine.stop
        signed_matmul(products, backend=_chosen(module.weight, self._backend))
        out[span] = total.add_(out[span]).to(out.dtype)

    def merged(
        self, module: nn.Linear, state: State, x: Tensor, batch: Batch, variants: Sequence[int], out: Tensor
    ) -> None:
        """Multiply with merged weights, variant by variant."""
        weights, weight = state.patches.get("weight", {}), module.weight.detach()
        for v in variants:
            span = batch.span([v])
            bias = state.parameter(module, "bias", v) if module.bias is not None else None
            out[span] = _merged(weight, weights[v], x[span], bias, state.scratch, _chosen(weight, self._backend))


def _merged(
    weight: Tensor, patches: Sequence[Patch], x: Tensor, bias: Tensor | None, scratch: Scratch, backend: str
) -> Tensor:
    """x times the merged weights, which are rebuilt in blocks."""
    out = x.new_empty(len(x), len(weight))
    by_range = {(patch.begin, patch.end): patch for patch in patches}
    for begin, end in row_ranges(by_range, len(weight)):
        patch = by_range.get((begin, end))
        step = max(1, _BLOCK // weight.shape[1]) if patch is not None and patch.factors else end - begin
        for first in range(begin, end, step):
            rows = slice(first, min(first + step, end))
            block = weight[rows]
            if patch is not None and patch.full is not None:
                block = patch.full
            elif patch is not None:
                inner = slice(first - patch.begin, rows.stop - patch.begin)
                where = scratch.rows(len(block), block) if backend == "numba" else None
                block = rebuild_tensor(block, [term.part(inner) for term in patch.factors], out=where, backend=backend)
            out[:, rows] = functional.linear(x, block, None if bias is None else bias[rows])
    return out


def row_ranges(changed: Iterable[tuple[int, int]], rows: int) -> Iterator[tuple[int, int]]:
    """All rows of a weight in order, as [begin, end): the changed ranges, and the ranges between them."""
    at = 0
    for begin, end in sorted(changed):
        if begin > at:
            yield at, begin
        yield begin, end
        at = end
    if at < rows:
        yield at, rows
