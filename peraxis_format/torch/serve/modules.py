"""Modules that serve several variants at once: their common base, and the embedding.

    linear      see linear.py
    embedding   the rows of W_v for the tokens of the batch: the merged bits
    other       see grouped.py

A module keeps its place in the model, its parameters and its name. Its class is replaced by one of these (for other
modules, its forward), and `Served.close` restores it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from threading import local
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peraxis_format.errors import LiveModelError
from peraxis_format.ops.rebuild import rebuild_tensor
from peraxis_format.ops.rebuild.torch import ComponentTensors, Scratch
from peraxis_format.torch.serve.lookup import patched_rows
from peraxis_format.torch.serve.rows import Batch, Rows

__all__ = ["Patch", "Products", "ServedEmbedding", "ServedModule", "State"]


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """One variant's rows [begin, end) of one parameter: components, or the exact tensor.

    region: shape, strides and offset of a slice that is not a range of whole rows (for example one expert's gate).
    dtype: the dtype of the merged weights; the parameter's, or a narrower one (place/widened.py). None for an exact
    tensor.
    """

    begin: int
    end: int
    factors: tuple[ComponentTensors, ...] = ()
    full: Tensor | None = None
    batch: tuple[tuple[ComponentTensors, ...], ...] = ()  # the components of each matrix, for 3 or more dimensions
    region: tuple[tuple[int, ...], tuple[int, ...], int] | None = None
    dtype: torch.dtype | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """This patch's slice of a parameter, or of a tensor in the same layout."""
        if self.region is None:
            return tensor[self.begin : self.end] if tensor.ndim else tensor
        shape, strides, offset = self.region
        return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


@dataclass(slots=True, eq=False)
class State:
    """The state of one module in a `Served`: patches by parameter name and variant, and the batch's rows.

    alone: a context in which all rows are of one variant. grouped: the module runs for each variant even if no variant
    changes it, because it reorders rows (routed experts). products: the products of a linear. broadcast: an embedding
    whose input may be one sequence for all (positions, not tokens).
    """

    rows: Callable[[], Rows | None]
    alone: Callable[[int], AbstractContextManager[None]]
    products: Products
    scratch: Scratch
    broadcast: bool = False
    grouped: bool = False
    patches: dict[str, dict[int, list[Patch]]] = field(default_factory=dict)
    _here: local = field(default_factory=local)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Within the block, for the module's own forward in this thread, its parameters are the real ones."""
        before = getattr(self._here, "inside", False)
        self._here.inside = True
        try:
            yield
        finally:
            self._here.inside = before

    def seen(self, module: nn.Module, name: str, value: Any) -> Any:
        """A parameter for code outside the module's forward (Mamba reads its convolution's weight directly)."""
        rows = self.rows()
        if rows is None or getattr(self._here, "inside", False) or not isinstance(value, Tensor):
            return value
        patches = self.patches.get(name, {})
        if not any(variant in patches for variant in rows.variants):
            return value
        if rows.only is not None:
            return self.parameter(module, name, rows.only)
        return value.detach().as_subclass(_MixedWeight)

    def changed(self, variant: int) -> bool:
        """Whether a variant differs from the base in this module."""
        return any(variant in patches for patches in self.patches.values())

    def parameter(self, module: nn.Module, name: str, variant: int) -> Tensor:
        """A variant's merged parameter; a new tensor if it differs from the base's."""
        with self.own():
            base: Tensor = getattr(module, name)
        patches = self.patches.get(name, {}).get(variant)
        if not patches:
            return base
        out = base.detach().clone()
        for patch in patches:
            source, target = patch.of(base.detach()), patch.of(out)
            if patch.full is not None:
                target.copy_(patch.full)
                continue
            source = source.to(patch.dtype)
            if patch.batch:
                matrices = source.reshape(-1, *source.shape[-2:])
                merged = [rebuild_tensor(matrix, terms) for matrix, terms in zip(matrices, patch.batch, strict=True)]
                target.copy_(torch.stack(merged).reshape(source.shape))
            else:
                target.copy_(rebuild_tensor(source, patch.factors))
        return out


class Products(Protocol):
    """The products of one linear with several variants' weights. x: [rows, in_features]; out: [rows, out_features]."""

    def many(self, module: nn.Linear) -> int:
        """The number of rows of a variant from which `merged` is faster."""

    def single(self, module: nn.Linear, state: State, x: Tensor, variant: int) -> Tensor | None:
        """The output for a batch of one row; None if there is no special kernel for it."""

    def add_components(
        self, module: nn.Linear, state: State, x: Tensor, batch: Batch, variants: Sequence[int], out: Tensor
    ) -> None:
        """Add components, and the biases that a variant changes, to the base's product in `out`."""

    def merged(
        self, module: nn.Linear, state: State, x: Tensor, batch: Batch, variants: Sequence[int], out: Tensor
    ) -> None:
        """Write products with the merged weights, with biases, to `out`."""


class _MixedWeight(Tensor):
    """A weight that differs by row of the batch; it has a dtype, a shape and a device, but no values."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in ("__get__", "size", "dim", "numel", "is_floating_point"):
            raise LiveModelError(
                "a module reads the weights of another module directly, and they differ by row in this batch; "
                "serve one variant per batch"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class ServedModule(nn.Module):
    """The base of served modules: code outside the forward cannot read the base's weights instead of a variant's."""

    peraxis: State

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        state: State | None = self.__dict__.get("peraxis")
        return value if state is None or name not in state.patches else state.seen(self, name, value)


class ServedEmbedding(ServedModule, nn.Embedding):
    """An embedding that looks each sequence up in its own variant's table; only the needed rows are rebuilt."""

    peraxis_class: type[nn.Embedding]

    def forward(self, input: Tensor) -> Tensor:
        """input: token ids. Returns the output of the class's own forward with the variants' tables."""
        with self.peraxis.own():
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        state, rows = self.peraxis, self.peraxis.rows()
        plain = self.peraxis_class.forward
        if rows is None or not any(state.changed(v) for v in rows.variants):
            return plain(self, input)
        if state.broadcast and input.ndim > 1 and len(input) == 1 and rows.only is None:
            input = input.expand(len(rows.ids), *input.shape[1:])  # positions that all sequences share
        out: Tensor | None = None
        flat = input.reshape(-1)
        for variant, index in rows.batch(input.shape, input.device).groups.items():
            found = self._lookup(state, flat[index], variant, plain)
            if out is None:
                out = found.new_empty(len(flat), found.shape[-1])
            out[index] = found
        if out is None:
            return plain(self, input)
        return out.reshape(*input.shape, -1)

    def _lookup(self, state: State, ids: Tensor, variant: int, plain: Callable[..., Tensor]) -> Tensor:
        patches = state.patches["weight"].get(variant) if variant >= 0 else None
        if not patches:
            return plain(self, ids)
        unique, inverse = torch.unique(ids, return_inverse=True)
        table = patched_rows(self.weight.detach(), unique, patches)
        # Run the class's own forward on a table of the needed rows, so that its scaling is applied.
        shadow: Any = nn.Embedding.__new__(self.peraxis_class)
        shadow.__dict__.update(self.__dict__)
        shadow.__dict__["_parameters"] = {**self._parameters, "weight": nn.Parameter(table, requires_grad=False)}
        shadow.padding_idx = None
        found: Tensor = plain(shadow, inverse)
        return found
