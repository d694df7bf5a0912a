"""A linear that gives each row of a batch its own variant.

    few rows of a variant     y = x W^T + sum over k of row_k o ((x o col_k) B_k^T)      W read once for all of them
    many                      y = x W_v^T, W_v rebuilt a block at a time                 the merged weights' values

On CUDA both are kernels (launch.py). Here they are plain torch, and on the CPU numba for large matrices (terms.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from peraxis_format.torch.rows import Rows
from peraxis_format.torch.served import Patch, State
from peraxis_format.torch.terms import Scratch, add_projections, is_quick, rebuild

__all__ = ["MANY_ROWS", "ServedLinear"]

MANY_ROWS: Final = 64  # rows of one variant from which its weights are rebuilt rather than added to
_MANY_ROWS_QUICK: Final = 32  # with numba a product costs as much as the rebuilding from here on
_BLOCK: Final = (
    1 << 22
)  # weights that are rebuilt at a time: what is rebuilt is still in the cache when it is multiplied


class ServedLinear(nn.Linear):
    """A linear that adds each row's own variant."""

    peraxis: State

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., in_features]. Returns [..., out_features], in the input's dtype."""
        state, rows = self.peraxis, self.peraxis.rows()
        if rows is None or not any(state.changed(v) for v in rows.variants):
            return functional.linear(input, self.weight, self.bias)
        lead = input.shape[:-1]
        x = input.reshape(-1, input.shape[-1])
        if state.kernels is not None:
            out: Tensor = state.kernels.linear(self, state, x, lead, rows)
        else:
            out = _each(self, state, x, lead, rows)
        return out.reshape(*lead, self.out_features)


def _each(module: nn.Linear, state: State, x: Tensor, lead: Sequence[int], rows: Rows) -> Tensor:
    """Every row's product. x: [rows, in_features]."""
    weights, biases = state.patches.get("weight", {}), state.patches.get("bias", {})
    quick = is_quick(module.weight)
    many = _MANY_ROWS_QUICK if quick else MANY_ROWS
    groups = rows.groups(lead, x.device)
    rebuilt = [
        v for v, index in groups.items()
        if v in weights and (len(index) >= many or any(patch.full is not None for patch in weights[v]))
    ]  # fmt: skip
    others = [v for v in groups if v not in rebuilt]
    # Variants with a bias of their own get it below: the base's product for them is one without.
    split = ([v for v in others if v not in biases], module.bias), ([v for v in others if v in biases], None)
    out = x.new_empty(len(x), module.out_features)
    for variants, given in split:
        if variants:
            span = rows.span(lead, variants, x.device)
            out[span] = functional.linear(x[span], module.weight, given)
    few = [v for v in others if v in weights or v in biases]
    if few:
        _add_terms(module, state, x, [(v, len(groups[v])) for v in few], rows.span(lead, few, x.device), out, quick)
    for v in rebuilt:
        span = rows.span(lead, [v], x.device)
        bias = state.parameter(module, "bias", v) if module.bias is not None else None
        out[span] = _merged(module.weight.detach(), weights[v], x[span], bias, state.scratch, quick=quick)
    return out


def _add_terms(
    module: nn.Linear, state: State, x: Tensor, counts: Sequence[tuple[int, int]], span: slice | Tensor, out: Tensor,
    quick: bool,
) -> None:  # fmt: skip
    """Terms and changed biases on top of the base's product, in binary32, rounded once.

    counts: (variant, rows) of one variant after the other; span: where these rows are in x and out.
    """
    weights, biases = state.patches.get("weight", {}), state.patches.get("bias", {})
    part = x[span]
    total = torch.zeros(len(part), module.out_features, device=x.device)
    products, first = [], 0
    for v, count in counts:
        mine = slice(first, first + count)
        if v in biases:
            total[mine] += state.parameter(module, "bias", v).detach().float()
        products += [(part[mine], patch.terms, total[mine, patch.begin : patch.end]) for patch in weights.get(v, ())]
        first += count
    add_projections(products, quick=quick)
    out[span] = total.add_(out[span]).to(out.dtype)


def _merged(
    weight: Tensor, patches: Sequence[Patch], x: Tensor, bias: Tensor | None, scratch: Scratch, *, quick: bool
) -> Tensor:
    """x times the merged weights, which are never whole in memory."""
    out = x.new_empty(len(x), len(weight))
    for begin, end, patch in _segments(patches, len(weight)):
        step = max(1, _BLOCK // weight.shape[1]) if patch is not None and patch.terms else end - begin
        for first in range(begin, end, step):
            rows = slice(first, min(first + step, end))
            part = weight[rows]
            if patch is not None and patch.full is not None:
                part = patch.full
            elif patch is not None:
                inner = slice(first - patch.begin, rows.stop - patch.begin)
                where = scratch.rows(len(part), part) if quick else None
                part = rebuild(part, [term.part(inner) for term in patch.terms], out=where, quick=quick)
            out[:, rows] = functional.linear(x, part, None if bias is None else bias[rows])
    return out


def _segments(patches: Sequence[Patch], rows: int) -> Iterator[tuple[int, int, Patch | None]]:
    """All rows of a weight in order: those of each patch, and what lies between them."""
    at = 0
    for patch in sorted(patches, key=lambda patch: patch.begin):
        if patch.begin > at:
            yield at, patch.begin, None
        yield patch.begin, patch.end, patch
        at = patch.end
    if at < rows:
        yield at, rows, None
