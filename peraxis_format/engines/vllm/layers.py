"""Change vLLM's layers so that each row of a step gets its own variant. The base's weights are never written.

linear                y = base product for all rows + each row's own terms, before any all-reduce (patches.py)
lm_head               the same, by the rows that logits are asked for
embedding             rows of the variant's table: the merged bits
other layers          the layer itself, run on each variant's rows with its own parameters: the merged bits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peraxis_format.engines.vllm.batch import Groups, StepRows
from peraxis_format.engines.vllm.bridge import Scratch, many_rows
from peraxis_format.engines.vllm.names import LinearBase, VocabParallelEmbedding, all_reduce
from peraxis_format.engines.vllm.patches import (
    LayerPatch,
    RankPatch,
    add_components,
    embedded,
    merged_linear,
    merged_parameter,
)
from peraxis_format.errors import LiveModelError

__all__ = ["LayerState", "RankVariant", "wrap_layers"]


@dataclass(slots=True, eq=False)
class RankVariant:
    """One variant on this rank: its patches of each layer, in the memory of the model's device."""

    name: str
    content_id: str
    layers: Mapping[nn.Module, LayerPatch]

    @property
    def nbytes(self) -> int:
        """The bytes in memory; patches that tied layers share count once."""
        patches = {id(p): p for layer in self.layers.values() for of in layer.values() for p in of}
        return sum(patch.nbytes for patch in patches.values())

    def of(self, layer: nn.Module, parameter: str) -> Sequence[RankPatch]:
        """The patches of a layer's parameter; empty if the variant does not change it."""
        return self.layers.get(layer, {}).get(parameter, ())


@dataclass(slots=True, eq=False)
class LayerState:
    """The state that all wrapped layers share. exact: multiply with rebuilt weights for any number of rows."""

    rows: StepRows[RankVariant]
    exact: bool = False
    scratch: Scratch = field(default_factory=Scratch)


def wrap_layers(model: nn.Module, state: LayerState) -> None:
    """Wrap the layers of a loaded model so that they serve variants."""
    for module in model.modules():
        if isinstance(module, LinearBase | VocabParallelEmbedding):
            module.quant_method = _Method(module.quant_method, state, logits=not isinstance(module, LinearBase))
        if isinstance(module, VocabParallelEmbedding):
            module.forward = _EmbeddingForward(module, state)
        elif not isinstance(module, LinearBase) and any(p is not None for p in module._parameters.values()):
            module.forward = _RowsForward(module, state)


class _Method:
    """Wraps the quant_method of a linear or of lm_head; other attributes are those of the wrapped one."""

    def __init__(self, plain: Any, state: LayerState, *, logits: bool) -> None:
        self._plain = plain
        self._state = state
        self._logits = logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [..., d_in]. Returns [..., d_out], in x's dtype."""
        rows = self._state.rows
        groups = rows.of_logits(x) if self._logits else rows.tokens
        members = [(v, index) for v, index in groups.members if v.of(layer, "weight") or v.of(layer, "bias")]
        if not members:
            plain: Tensor = self._plain.apply(layer, x, bias)
            return plain
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) < groups.count:
            raise LiveModelError(f"{type(layer).__name__}: {len(flat)} rows for {groups.count} tokens")
        return self._mixed(layer, flat, bias, groups, members).reshape(*x.shape[:-1], -1)

    def _mixed(
        self,
        layer: Any,
        x: Tensor,
        bias: Tensor | None,
        groups: Groups[RankVariant],
        members: list[tuple[RankVariant, Any]],
    ) -> Tensor:
        weight = layer.weight.detach()
        many = 1 if self._state.exact else many_rows(weight)
        if groups.only is not None and len(x) >= many:
            return self._merged(layer, x, weight, bias, groups.only)
        y: Tensor = self._plain.apply(layer, x, bias)
        few = []
        for variant, index in members:
            part = x[index]
            exact = any(p.full is not None for p in variant.of(layer, "weight"))
            if len(part) >= many or exact:
                y[index] = self._merged(layer, part, weight, bias, variant)
                continue
            few.append((index, variant.of(layer, "weight")))
            if bias is not None and variant.of(layer, "bias"):
                own = merged_parameter(bias, variant.of(layer, "bias"))
                y[index] = (y[index].float() + (own.float() - bias.float())).to(y.dtype)
        if few:
            add_components(y, x, few)
        return y

    def _merged(self, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, variant: RankVariant) -> Tensor:
        own = bias if bias is None else merged_parameter(bias, variant.of(layer, "bias"))
        patches = variant.of(layer, "weight")
        if not patches:
            product: Tensor = self._plain.apply(layer, x, own)
            return product
        return merged_linear(x, weight, patches, own, self._state.scratch)


class _EmbeddingForward:
    """Replaces the forward of an embedding; each rank looks up its own rows of the vocabulary."""

    def __init__(self, module: Any, state: LayerState) -> None:
        self._module = module
        self._state = state
        self._plain: Callable[..., Tensor] = module.forward

    def __call__(self, input_: Tensor) -> Tensor:
        y = self._plain(input_)
        module = self._module
        groups = [(v, index) for v, index in self._state.rows.tokens.members if v.of(module, "weight")]
        if not groups:
            return y
        begin, end = module.shard_indices.org_vocab_start_index, module.shard_indices.org_vocab_end_index
        for variant, index in groups:
            ids = input_[index].long()
            here = (ids >= begin) & (ids < end)
            found = y.new_zeros(len(ids), y.shape[-1])
            found[here] = embedded(ids[here] - begin, module.weight.detach(), variant.of(module, "weight"))
            # One rank has the row and the others add zeros, so the sum is the row.
            y[index] = all_reduce(found) if module.tp_size > 1 else found
        return y


class _RowsForward:
    """Replaces the forward of any other layer with parameters; dimension 0 of its arguments is the tokens."""

    def __init__(self, module: nn.Module, state: LayerState) -> None:
        self._module = module
        self._state = state
        self._plain: Callable[..., Any] = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = self._state.rows.tokens
        groups = [(v, index) for v, index in rows.members if v.layers.get(self._module)]
        if not groups:
            return self._plain(*args, **kwargs)
        if rows.only is not None:
            with self._parameters(rows.only):
                return self._plain(*args, **kwargs)
        # The layer may work in place, so a variant's inputs are copied before the base's run.
        taken = [(v, index, *_rows_of(args, kwargs, index, rows.count)) for v, index in groups]
        out = self._plain(*args, **kwargs)
        for variant, index, own_args, own_kwargs in taken:
            with self._parameters(variant):
                _put(out, self._plain(*own_args, **own_kwargs), index)
        return out

    @contextmanager
    def _parameters(self, variant: RankVariant) -> Iterator[None]:
        """Within the block the layer's parameters are the variant's."""
        held = {}
        for name, patches in variant.layers[self._module].items():
            parameter = self._module._parameters[name]
            assert parameter is not None
            held[name] = parameter.data
            parameter.data = merged_parameter(parameter.data, patches)
        try:
            yield
        finally:
            for name, data in held.items():
                self._module._parameters[name].data = data  # type: ignore[union-attr]


def _rows_of(
    args: tuple[Any, ...], kwargs: dict[str, Any], index: Any, count: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def take(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if value.shape[0] < count:
            raise LiveModelError(f"a layer was given {value.shape[0]} rows for {count} tokens; serve one variant")
        return value[index].clone()

    return tuple(map(take, args)), {key: take(value) for key, value in kwargs.items()}


def _put(out: Any, own: Any, index: Any) -> None:
    if isinstance(out, torch.Tensor):
        out[index] = own
        return
    for all_rows, some in zip(out, own, strict=True):
        if all_rows is not None:
            all_rows[index] = some
