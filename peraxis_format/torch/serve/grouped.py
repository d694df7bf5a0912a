"""Other modules in a mixed batch: the module runs on each variant's rows with its parameters, with the merged bits.

The outputs are joined again by rows. A module may return one row per sequence, or one per token if it flattens them; an
embedding of positions may return one table for all sequences. Other outputs are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peraxis_format.errors import LiveModelError
from peraxis_format.torch.serve.modules import State
from peraxis_format.torch.serve.rows import Rows

__all__ = ["GroupForward"]


class GroupForward:
    """Replaces a module's forward by one run for each variant in the batch, on that variant's rows."""

    def __init__(self, module: nn.Module, state: State) -> None:
        self.module = module
        self.state = state
        self.replaced: Callable[..., Any] | None = module.__dict__.get("forward")  # of another library
        self.plain: Callable[..., Any] = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module. Dimension 0 of each tensor argument of the batch's size is the batch; if there is none,
        dimension 0 of a matrix that is a multiple of it is the batch's tokens, one sequence after the other.
        """
        rows = self.state.rows()
        if rows is None or not (self.state.grouped or any(self.state.changed(v) for v in rows.variants)):
            return self.plain(*args, **kwargs)
        if rows.only is not None:
            return self._run(rows.only, args, kwargs)
        self._refuse_cache((*args, *kwargs.values()))
        shape, device = self._leading(rows, args, kwargs)
        groups = rows.batch(shape, device).groups
        outputs = [
            self._run(variant, *_taken(args, kwargs, index, math.prod(shape))) for variant, index in groups.items()
        ]
        counts = [len(index) for index in groups.values()]
        if isinstance(self.module, nn.Embedding):
            outputs = [_one_a_sequence(output, count) for output, count in zip(outputs, counts, strict=True)]
        back = torch.argsort(torch.cat(list(groups.values())))
        heights = _heights((*args, *kwargs.values()), math.prod(shape))
        return _Joined(_plain_name(self.module), counts, back, heights).of(outputs)

    def _leading(
        self, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[int, ...], torch.device]:
        """The meaning of the arguments' dimension 0, (sequences,) or (sequences, tokens), and their positions."""
        size = len(rows.ids)
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.ndim]
        for a in given:
            if a.shape[0] == size:
                return (size,), a.device
        for a in given:
            whole = rows.lead is None or rows.lead[0] != size or a.shape[0] == math.prod(rows.lead)
            if a.ndim == 2 and a.shape[0] % size == 0 and whole:
                return (size, a.shape[0] // size), a.device
        if isinstance(self.module, nn.Embedding):  # positions, from a shape or a range
            return (size,), self.module.weight.device
        raise LiveModelError(
            f"{_plain_name(self.module)}: no argument has the batch ({size}) as dimension 0, so its variants are "
            "unknown; serve one variant per batch"
        )

    def _refuse_cache(self, values: tuple[Any, ...]) -> None:
        """Refuse a cache of the whole batch, because a run on some rows would overwrite the others."""
        if any("Cache" in kind.__name__ for value in values for kind in type(value).__mro__):
            raise LiveModelError(
                f"{_plain_name(self.module)}: has weights that variants change, and a cache; mixed "
                "variants need use_cache=False there, or one variant per batch"
            )

    def _run(self, variant: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.state.alone(variant), self.state.own():
            return self._merged_run(variant, args, kwargs)

    def _merged_run(self, variant: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if variant < 0 or not self.state.changed(variant):
            return self.plain(*args, **kwargs)
        merged = {
            name: self.state.parameter(self.module, name, variant)
            for name, patches in self.state.patches.items()
            if variant in patches
        }
        held = self.module.__dict__.pop("forward")
        if self.replaced is not None:
            self.module.__dict__["forward"] = self.replaced
        try:
            return functional_call(self.module, merged, args, kwargs)
        finally:
            self.module.__dict__["forward"] = held


def _plain_name(module: nn.Module) -> str:
    """The name of the module's own class, not of the serving class that replaces it."""
    return type(module).__name__.removeprefix("Served")


def _taken(
    args: tuple[Any, ...], kwargs: dict[str, Any], index: Tensor, size: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def take(value: Any) -> Any:
        if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
            return type(value)(map(take, value))
        batched = isinstance(value, Tensor) and value.ndim and value.shape[0] == size
        return value[index] if batched else value

    return tuple(map(take, args)), {key: take(value) for key, value in kwargs.items()}


def _heights(values: Sequence[Any], size: int) -> tuple[int, ...]:
    """The allowed numbers of output rows per input row: 1, or the tokens of a sequence that the module flattens."""
    given = (value for value in values if isinstance(value, Tensor) and value.ndim > 2 and len(value) == size)
    return 1, *(value.shape[1] for value in given)


def _one_a_sequence(output: Any, count: int) -> Any:
    """An embedding's rows [count, tokens, width] if it returned [1, tokens, width] for all sequences.

    [tokens, width] is left unchanged and then refused, because its user may add dimensions before it.
    """
    shared = isinstance(output, Tensor) and output.ndim == 3 and len(output) == 1
    return output.expand(count, *output.shape[1:]) if shared else output


class _Joined:
    """Joins the outputs of a module's runs into the output of one run on the whole batch.

    counts: rows of each run. back: the index that restores the order of the batch. heights: see _heights.
    """

    def __init__(self, name: str, counts: Sequence[int], back: Tensor, heights: Sequence[int]) -> None:
        self._name, self._counts, self._back, self._heights = name, counts, back, heights

    def of(self, outputs: Sequence[Any]) -> Any:
        """Join one value of all runs. Raises LiveModelError for a value without rows."""
        first = outputs[0]
        if isinstance(first, Tensor):
            return self._tensor(outputs)
        if first is None and all(value is None for value in outputs):
            return None
        if isinstance(first, tuple | list):
            joined = [self.of(list(column)) for column in zip(*outputs, strict=True)]
            return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
        if isinstance(first, dict):  # also transformers' ModelOutput
            return type(first)(**{key: self.of([value[key] for value in outputs]) for key in first})
        raise LiveModelError(f"{self._name}: returned {type(first).__name__}; serve one variant per batch")

    def _tensor(self, outputs: Sequence[Tensor]) -> Tensor:
        rows = [len(value) if value.ndim else 0 for value in outputs]
        for height in self._heights:
            # There are several rows for each if the module flattens tokens.
            flattened = height == 1 or outputs[0].ndim > 1
            if flattened and rows == [height * count for count in self._counts]:
                joined = torch.cat(list(outputs))
                return joined.reshape(len(self._back), height, *joined.shape[1:])[self._back].flatten(0, 1)
        raise LiveModelError(
            f"{self._name}: returned {sum(rows)} rows for a batch of {len(self._back)}; serve one variant per batch"
        )
